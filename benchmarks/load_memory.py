"""Host memory that loading a base takes beyond what a rank then holds, and whether it loads under a cgroup of little more.

    python benchmarks/load_memory.py

A Llama of 2.2 GB in bfloat16 is written in shards and loaded by ranks that are watched from outside: RssAnon every 10 ms, less
what of the rank's parameters, optimizer state and scales is in memory in the end. The goal is twice the largest layer, here the
embedding. With ``--limit`` each rank then loads again in a memory cgroup of its shard and that, and a fifth more.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import big_models
import load_ranks

CASES = {
    "LoRA, bfloat16 base": {"method": "lora", "world": 1},
    "LoRA, bfloat16 base, FSDP2 on 2": {"method": "lora", "world": 2},
    "NF4, quantised on the way": {"method": "nf4", "world": 1},
    "NF4, from the cache": {"method": "nf4", "world": 1},
    "NF4, from the cache, FSDP2 on 2": {"method": "nf4", "world": 2},
    "full, fp32 masters, 8-bit AdamW": {"method": "full", "precision": "fp32", "optimizer": "adamw_8bit", "world": 1},
    "full, fp32 masters, 8-bit AdamW, FSDP2 on 2": {"method": "full", "optimizer": "adamw_8bit", "world": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="these alone", metavar="CASE")
    parser.add_argument("--limit", action="store_true", help="load again under a cgroup")
    options = parser.parse_args()
    shape = big_models.BIG
    goal = 2 * shape.largest_layer * 2
    limited = options.limit and load_ranks.can_limit_memory()
    print(f"{shape.parameters:,} parameters; twice the largest layer: {goal / 1e6:,.0f} MB", flush=True)
    if options.limit and not limited:
        print("no memory cgroup can be made here: not loaded under a limit")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = big_models.write_folder(root / "base", shape)
        for name in options.cases:
            case = load_ranks.Case(base=str(base), cache=str(root / "cache"), **CASES[name])  # type: ignore[arg-type]
            ranks = _load(case, root)
            _show(name, ranks)
            if limited:
                if "on the way" in name:
                    shutil.rmtree(root / "cache")
                allowed = int(1.2 * (max(rank.shard for rank in ranks) + goal))
                _show(f"  in a cgroup of {allowed / 1e6:,.0f} MB", _load(dataclasses.replace(case, limit_bytes=allowed), root))


def _load(case: load_ranks.Case, root: Path) -> list[load_ranks.Loaded]:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        return load_ranks.load(case, Path(folder))


def _show(name: str, ranks: list[load_ranks.Loaded]) -> None:
    most = max(ranks, key=lambda rank: rank.overhead)
    print(
        f"{name}: peak {most.peak / 1e6:,.0f} MB, shard {most.shard / 1e6:,.0f}, beyond it {most.overhead / 1e6:,.0f} "
        f"(before loading {most.before / 1e6:,.0f}), file pages {most.files / 1e6:,.0f}, {most.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
