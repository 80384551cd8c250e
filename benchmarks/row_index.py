"""Time to make, open and order the row index of a store of many documents.

    python benchmarks/row_index.py --documents 1000000 --rounds 5

Making an index reads ``documents.safetensors`` (checked), shuffles within windows, cuts, and commits (digests, fsync). The
store here has that file and its manifest alone: a row index reads no token of a document whose loss weights are all 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from outgrow.streaming.manifest import commit
from outgrow.streaming.rows import RowIndex, build_index
from outgrow.streaming.sampler import epoch_order


def write_documents(store: Path, num_documents: int, *, mean_length: int, per_shard: int) -> int:
    """A store of one stream; how many tokens its documents have."""
    lengths = np.random.default_rng(0).exponential(mean_length, num_documents).astype(np.int64) + 1
    for split, own in (("train", lengths), ("validation", lengths[:0])):
        folder = store / "streams/text" / split
        folder.mkdir(parents=True)
        arrays = {
            "lengths": own,
            "shard": (np.arange(len(own)) // per_shard).astype(np.int32),
            "weight": (own - 1).astype(np.float64),
            "uniform": np.ones(len(own), np.bool_),
        }
        save_file(arrays, folder / "documents.safetensors")
    commit(store, "store.json", {"fingerprint": "benchmark"})
    return int(lengths.sum())


def measure(store: Path, out: Path, sequence_length: int) -> tuple[int, list[float]]:
    """Rows, and seconds to build, to open, and to order an epoch."""
    start = time.perf_counter()
    facts = build_index(store, out, sequence_length=sequence_length, window_shards=16, seed=0)
    built = time.perf_counter()
    index = RowIndex.open(out)
    opened = time.perf_counter()
    epoch_order(index, 0, 0)
    return facts.rows, [built - start, opened - built, time.perf_counter() - opened]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        tokens = write_documents(store, options.documents, mean_length=600, per_shard=50_000)
        rounds = []
        for _ in range(options.rounds):
            rows, seconds = measure(store, Path(folder, "rows"), options.sequence_length)
            rounds.append(seconds)
            shutil.rmtree(Path(folder, "rows"))
    print(f"{options.documents:,} documents, {tokens:,} tokens, {rows:,} rows of {options.sequence_length:,}")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}")
    print(f"{options.rounds} rounds")
    for name, values in zip(("build", "open", "order of an epoch"), zip(*rounds, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.2f} s (range {min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
