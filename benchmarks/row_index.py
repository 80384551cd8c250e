"""Time, memory and rows of the row index of a store of many documents, in each way of laying rows.

    python benchmarks/row_index.py --documents 10000000

The store has document tables (lengths lognormal, a border every 22 tokens in the mean) and its manifest alone: a row index
reads no token of a document whose loss weights are all 1. Making an index reads and checks the tables, draws, packs and cuts
window by window, and commits (digests, fsync). Each way is timed in a process of its own, whose peak of memory is taken.
Then the rows of one window are counted for the lengths of documents that the tests hold to their bounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import lengths as drawn  # noqa: E402
from table_stores import keep_all, table_of, write_table_store  # noqa: E402

from outgrow.recipes.schema.data import Data  # noqa: E402
from outgrow.streaming.bin_packing import best_fit, lower_bound  # noqa: E402
from outgrow.streaming.row_building import build_index  # noqa: E402
from outgrow.streaming.row_cuts import full_rows  # noqa: E402
from outgrow.streaming.rows import RowIndex  # noqa: E402

PART = 250_000
"""Documents of a table."""
TOKENS_A_SHARD = 32 * 2**20
"""Of 64 MiB, with 2 bytes a token."""
WAYS = {
    "full rows, shuffled": {},
    "full rows, sequential": {"order": "sequential"},
    "whole documents, shuffled": {"split": "never", "too_long": "split"},
    "whole documents, sequential": {"split": "never", "too_long": "split", "order": "sequential"},
}


def write(store: Path, num_documents: int) -> int:
    """The store; how many tokens its documents have."""
    tables, shard, tokens = [], 0, 0
    for part in range(-(-num_documents // PART)):
        count = min(PART, num_documents - part * PART)
        lengths = np.maximum(np.random.default_rng(part).lognormal(np.log(400), 0.9, count), 2).astype(np.int64)
        borders = drawn.sentences(lengths, seed=part)
        tables.append(table_of(lengths, borders=borders, tokens_a_shard=TOKENS_A_SHARD, first_shard=shard))
        shard, tokens = int(tables[-1].shard[-1]) + 1, tokens + int(lengths.sum())
    write_table_store(store, {"x": tables})
    return tokens


def peak_kb() -> int:
    """The most memory that this process held; unlike ``getrusage``, without what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def measure(folder: Path, num_documents: int, sequence_length: int, way: str) -> None:
    stream = {"name": "x", "source": {"kind": "text", "path": "x"}, **WAYS[way]}
    tokenizer = {"kind": "train", "vocab_size": 1000}
    data = Data.model_validate({"sequence_length": sequence_length, "tokenizer": tokenizer, "streams": [stream]})
    selection = keep_all({"x": num_documents})
    before = peak_kb()
    start = time.perf_counter()
    out = folder / "rows"
    facts = build_index(folder / "store", out, data=data, sequence_length=sequence_length, seed=0, selection=selection)
    built = time.perf_counter()
    peak = peak_kb() - before
    index = RowIndex.open(out)
    opened = time.perf_counter()
    (own,) = facts.train
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"| {way} | {built - start:.1f} | {peak / 1024:,.0f} | {own.rows:,} | {own.rows / own.fewest_rows:.4f} "
        f"| {own.cuts_at_borders / max(own.cuts, 1):.1%} | {size / 1e6:,.0f} | {1e3 * (opened - built):.0f} "
        f"| {len(index.train[0].window_rows) - 1} |"
    )


def show_distributions() -> None:
    print("\n| full rows | tokens a row | rows | of the fewest | cuts at borders |\n|---|---|---|---|---|")
    for draw in (drawn.books, drawn.articles, drawn.scenes):
        for length in (512, 2048, 8192):
            own = draw()
            order = np.random.default_rng(0).permutation(len(own))
            cuts = full_rows(order, np.cumsum(own[order]), drawn.sentences(own), length)
            rows, fewest = len(cuts.at) - 1, -(-int(own.sum()) // length)
            print(f"| {draw.__name__} | {length:,} | {rows:,} | {rows / fewest:.4f} | {cuts.at_borders / (rows - 1):.1%} |")
    print("\n| whole documents | tokens a row | rows | of the bound | full |\n|---|---|---|---|---|")
    for draw in (drawn.dialogues, drawn.mixed, drawn.lognormal):
        for length in (512, 2048, 8192):
            own = draw(length)
            rows = int(best_fit(own, length).max()) + 1
            fill = own.sum() / (rows * length)
            print(f"| {draw.__name__} | {length:,} | {rows:,} | {rows / lower_bound(own, length):.4f} | {fill:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.way:
        measure(options.folder, options.documents, options.sequence_length, options.way)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokens = write(Path(folder, "store"), options.documents)
        size = sum(path.stat().st_size for path in Path(folder, "store").rglob("*") if path.is_file())
        print(f"{options.documents:,} documents, {tokens:,} tokens, {size / 1e6:,.0f} MB of tables")
        print(f"Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}\n")
        print("| | build, s | peak memory, MB | rows | of the bound | cuts at borders | index, MB | open, ms | windows |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for way in [way for way in WAYS for _ in range(options.rounds)]:
            run = [sys.executable, __file__, "--documents", str(options.documents), "--folder", folder, "--way", way]
            subprocess.run([*run, "--sequence-length", str(options.sequence_length)], check=True)
            shutil.rmtree(f"{folder}/rows")
    show_distributions()


if __name__ == "__main__":
    main()
