"""Rate of ``outgrow data build`` against the bare ``tokenizers`` library on the same cores and text.

    python benchmarks/build_rate.py --mbytes 64 --rounds 5

Each round first encodes all texts with ``Tokenizer.encode_batch``, 1,000 documents a call and as many threads as cores, from
memory to token ids; then builds the dataset from JSON lines with as many processes: reading, hashing, parsing, encoding,
writing MDS shards, digests, row index, starting the processes. Ratios are of wall time and of CPU time of the whole build; the
latter hold on a machine that others use meanwhile.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import tokenizers
from corpus import library_texts, recipe_of, site_of, write_jsonl

from outgrow.streaming import _mosaic  # noqa: F401  (its import is not what is measured)
from outgrow.streaming.build import build
from outgrow.streaming.tokenizer import train


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds, the latter with those of ended child processes."""

    wall_s: float
    cpu_s: float

    @classmethod
    def until_now(cls) -> Self:
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), sum(usage.ru_utime + usage.ru_stime for usage in (own, children)))

    def since(self, start: Cost) -> Cost:
        return Cost(self.wall_s - start.wall_s, self.cpu_s - start.cpu_s)


def raw_cost(texts: list[str], tokenizer: Path) -> Cost:
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    start = Cost.until_now()
    for first in range(0, len(texts), 1000):
        encoder.encode_batch(texts[first : first + 1000], add_special_tokens=False)
    return Cost.until_now().since(start)


def build_cost(root: Path, source: Path, tokenizer: Path, processes: int) -> Cost:
    """A whole build from nothing."""
    site = site_of(root, {"text": source, "tokenizer": tokenizer}, processes)
    streams = [{"name": "text", "source": {"kind": "jsonl", "path": "text"}}]
    recipe = recipe_of(streams, {"kind": "folder", "path": "tokenizer"})
    start = Cost.until_now()
    assert build(recipe, site).built
    cost = Cost.until_now().since(start)
    shutil.rmtree(root / "storage")
    shutil.rmtree(root / "cache")
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = list(library_texts(options.mbytes * 1_000_000))
        mbytes = sum(len(text.encode()) for text in texts) / 1e6
        (root / "text").mkdir()
        write_jsonl(root / "text" / "text.jsonl", options.mbytes * 1_000_000)
        train(texts[:600], 8192, root / "tokenizer")
        print(f"{mbytes:.0f} MB, {len(texts):,} documents, {processes} processes; Python {platform.python_version()}, "
              f"tokenizers {tokenizers.__version__}")  # fmt: skip
        wall, cpu = [], []
        for number in range(options.rounds):
            raw = raw_cost(texts, root / "tokenizer")
            ours = build_cost(root, root / "text", root / "tokenizer", processes)
            wall.append(raw.wall_s / ours.wall_s)
            cpu.append(raw.cpu_s / ours.cpu_s)
            print(f"round {number}: raw {mbytes / raw.wall_s:.2f} MB/s, {mbytes / raw.cpu_s:.2f} MB a CPU second; build "
                  f"{mbytes / ours.wall_s:.2f} and {mbytes / ours.cpu_s:.2f}", flush=True)  # fmt: skip
    for name, ratios in (("wall time", wall), ("CPU time", cpu)):
        print(f"build / raw by {name}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
