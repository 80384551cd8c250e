"""Rate of ``outgrow data build`` against the bare ``tokenizers`` library, and against llm-foundry, on the same cores and text.

    python benchmarks/build_rate.py --mbytes 64 --rounds 5
    python benchmarks/build_rate.py --mbytes 64 --rounds 3 --foundry-python foundry/bin/python

Each round first encodes all texts with ``Tokenizer.encode_batch``, 1,000 documents a call and as many threads as cores, from
memory to token ids; then builds the dataset from JSON lines with as many processes: reading, hashing, parsing, encoding,
writing MDS shards, digests, row index, starting the processes. Ratios are of wall time and of CPU time of the whole build; the
latter hold on a machine that others use meanwhile.

With ``--foundry-python`` the other side is llm-foundry's ``convert_text_to_mds`` instead: the same text in files, its own
Python, as many processes, rows of 2,048 tokens; imports are not counted on either side. Such an environment is made by ``python
-m venv foundry`` and ``foundry/bin/pip install "llm-foundry==0.22.0" "setuptools<81"`` (some 7 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import tokenizers
from corpus import library_texts, recipe_of, site_of, write_jsonl

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


_FOUNDRY = """
import json, os, resource, sys, time
from llmfoundry.command_utils import convert_text_to_mds_from_args

def now():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.monotonic(), sum(usage.ru_utime + usage.ru_stime for usage in usages)

if __name__ == "__main__":
    source, tokenizer, out, processes = sys.argv[1:]
    start = now()
    convert_text_to_mds_from_args(
        output_folder=out, input_folder=source, compression=None, concat_tokens=2048, tokenizer_name=tokenizer, bos_text=None,
        eos_text=None, use_tokenizer_eos=True, no_wrap=False, processes=int(processes), reprocess=True, trust_remote_code=False,
        logging_level="WARNING",
    )
    print(json.dumps([stop - begin for stop, begin in zip(now(), start)]))
"""


def foundry_cost(python: str, root: Path, source: Path, tokenizer: Path, processes: int) -> Cost:
    """A whole conversion from nothing; its processes are forked from one that has imported all."""
    (root / "convert.py").write_text(_FOUNDRY)
    words = [python, str(root / "convert.py"), str(source), str(tokenizer), str(root / "mds"), str(processes)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    shutil.rmtree(root / "mds")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def build_cost(root: Path, kind: str, source: Path, tokenizer: Path, processes: int) -> Cost:
    """A whole build from nothing."""
    site = site_of(root, {"text": source, "tokenizer": tokenizer}, processes)
    streams = [{"name": "text", "source": {"kind": kind, "path": "text"}}]
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
    parser.add_argument("--foundry-python", default="")
    options = parser.parse_args()
    # Its import is not what is measured; here, for the processes of a build import what stands at the head of this file.
    from outgrow.streaming import _mosaic  # noqa: F401

    processes = len(os.sched_getaffinity(0))
    other, kind = ("llm-foundry", "text") if options.foundry_python else ("raw", "jsonl")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = list(library_texts(options.mbytes * 1_000_000))
        mbytes = sum(len(text.encode()) for text in texts) / 1e6
        (root / "text").mkdir()
        if kind == "jsonl":
            write_jsonl(root / "text" / "text.jsonl", options.mbytes * 1_000_000)
        else:
            for number, text in enumerate(texts):
                (root / "text" / f"{number:06}.txt").write_text(text, encoding="utf-8")
        train(texts[:600], 8192, root / "tokenizer")
        print(f"{mbytes:.0f} MB, {len(texts):,} documents, {processes} processes; Python {platform.python_version()}, "
              f"tokenizers {tokenizers.__version__}")  # fmt: skip
        wall, cpu = [], []
        for number in range(options.rounds):
            if options.foundry_python:
                theirs = foundry_cost(options.foundry_python, root, root / "text", root / "tokenizer", processes)
            else:
                theirs = raw_cost(texts, root / "tokenizer")
            ours = build_cost(root, kind, root / "text", root / "tokenizer", processes)
            wall.append(theirs.wall_s / ours.wall_s)
            cpu.append(theirs.cpu_s / ours.cpu_s)
            print(f"round {number}: {other} {mbytes / theirs.wall_s:.2f} MB/s, {mbytes / theirs.cpu_s:.2f} MB a CPU second; "
                  f"build {mbytes / ours.wall_s:.2f} and {mbytes / ours.cpu_s:.2f}", flush=True)  # fmt: skip
    for name, ratios in (("wall time", wall), ("CPU time", cpu)):
        print(f"build / {other} by {name}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
