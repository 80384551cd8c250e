"""Tokens a second of the loader, and how long a rank that computes waits for it.

    python benchmarks/loader_rate.py --rounds 5

A store of random documents (lengths exponential, 600 tokens in the mean) in shards of 16 MB, rows of 2,048 tokens, 16 rows a
step. Each round reads ``--steps`` steps as fast as it can, after the first: by 0, 1 and 2 loader workers. Then one worker
reads for a rank that multiplies matrices with all cores for about ``--step-s`` seconds a step, and the time inside
``next(loader)`` is taken.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from token_stores import Dataset, layout, make_dataset  # noqa: E402

from outgrow.streaming.loader import build_loader  # noqa: E402

ROWS = 16
LENGTH = 2048


def make(root: Path, num_tokens: int) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = rng.exponential(600, num_tokens // 600).astype(np.int64) + 1
    documents = [(rng.integers(0, 1000, int(length)), None) for length in lengths]
    return make_dataset(root, {"text": (documents, [])}, sequence_length=LENGTH, window_shards=16, shard_bytes=16 * 2**20)


def rate(dataset: Dataset, workers: int, steps: int) -> tuple[float, float, float]:
    """Tokens a second after the first step, which waits for the workers to start; and CPU seconds of rank and workers."""
    before = cpu_seconds()
    loader = build_loader(dataset.job(rows=ROWS, workers=workers), layout(1, ROWS, ROWS), 0, start_step=0, stop_step=steps)
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in iterator:
        pass
    seconds = time.perf_counter() - start
    loader.close()
    rank, children = (after - own for after, own in zip(cpu_seconds(), before, strict=True))
    return (steps - 1) * ROWS * LENGTH / seconds, rank, children


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return usages[0].ru_utime + usages[0].ru_stime, usages[1].ru_utime + usages[1].ru_stime


def waits(dataset: Dataset, steps: int, step_s: float) -> list[tuple[float, float]]:
    """Seconds of waiting and of computing of each step."""
    matrix = torch.rand(1024, 1024)
    start = time.perf_counter()
    for _ in range(10):
        matrix @ matrix
    products = max(1, round(10 * step_s / (time.perf_counter() - start)))
    loader = build_loader(dataset.job(rows=ROWS, workers=1), layout(1, ROWS, ROWS), 0, start_step=0, stop_step=steps)
    iterator, seen = iter(loader), []
    next(iterator)
    for _ in range(steps - 1):
        begin = time.perf_counter()
        next(iterator)
        got = time.perf_counter()
        for _ in range(products):
            matrix @ matrix
        seen.append((got - begin, time.perf_counter() - got))
    loader.close()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mtokens", type=int, default=60)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-s", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make(Path(folder), options.mtokens * 1_000_000)
        rates: dict[int, list[tuple[float, float, float]]] = {0: [], 1: [], 2: []}
        for _ in range(options.rounds):
            for workers, values in rates.items():
                values.append(rate(dataset, workers, options.steps))
        seen = waits(dataset, 41, options.step_s)
    print(f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}")
    print(f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    tokens = options.steps * ROWS * LENGTH
    for workers, results in rates.items():
        values = [tokens_per_s / 1e6 for tokens_per_s, _, _ in results]
        rank = statistics.median(1e9 * seconds / tokens for _, seconds, _ in results)
        children = statistics.median(1e9 * seconds / tokens for _, _, seconds in results)
        print(f"{workers} workers: median {statistics.median(values):.1f} M tokens/s ({min(values):.1f} to {max(values):.1f});")
        print(f"           CPU ns a token: rank {rank:.0f}, workers {children:.0f}")
    wait, compute = (statistics.median(column) for column in zip(*seen, strict=True))
    print(f"wait: median {wait * 1e3:.2f} ms of a step of {compute:.2f} s ({100 * wait / compute:.2f} %)")


if __name__ == "__main__":
    main()
