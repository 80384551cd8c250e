"""Choice of documents: signatures and languages as the build makes them, and the choice among a million documents.

    python benchmarks/selection.py --documents 1000000

The million have made-up signatures: a fifth near-duplicates of another one at similarities from 0.5 to 1, a tenth equal to
another, and a cluster of 2% that are all like one text at 0.7 to 1. Memory is anonymous memory above that of the empty process;
signatures are mapped from files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpus import library_texts

from outgrow.streaming.document_table import SIGNATURE_SIZE, DocumentTable
from outgrow.streaming.duplicates import signature
from outgrow.streaming.languages import detect
from outgrow.streaming.selection import select

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from document_tables import data_of, finish  # noqa: E402

PART = 25_000
CLUSTER = 99


def write_store(folder: Path, documents: int) -> None:
    """A store of document tables alone; the first part is held out."""
    rng = np.random.default_rng(0)
    base = np.random.default_rng(CLUSTER).integers(0, 2**32, SIGNATURE_SIZE, dtype=np.uint32)
    for part in range(documents // PART):
        made = rng.integers(0, 2**32, (PART, SIGNATURE_SIZE), dtype=np.uint32)
        originals, copies = rng.integers(0, PART // 2, PART // 5), rng.permutation(np.arange(PART // 2, PART))[: PART // 5]
        agree = rng.random((len(copies), SIGNATURE_SIZE)) < rng.uniform(0.5, 1, (len(copies), 1))
        made[copies] = np.where(agree, made[originals], made[copies])
        cluster = rng.permutation(PART)[: PART // 50]
        agree = rng.random((len(cluster), SIGNATURE_SIZE)) < rng.uniform(0.7, 1, (len(cluster), 1))
        made[cluster] = np.where(agree, base, made[cluster])
        content = rng.integers(0, 2**63, (PART, 2), dtype=np.uint64)
        content[5::10] = content[4::10]
        table = DocumentTable(
            lengths=np.ones(PART, np.int64),
            shard=np.zeros(PART, np.int32),
            weight=np.ones(PART),
            uniform=np.ones(PART, np.bool_),
            chars=np.full(PART, 1000, np.int64),
            content=content,
            border_counts=np.zeros(PART, np.int32),
            borders=np.zeros(0, np.int32),
            signature=made,
        )
        table.save(folder / "streams/s" / ("train" if part else "validation"), part)
    finish(folder)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def watched(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What ``work`` returns, its seconds, and the most anonymous memory above that before it."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return result, seconds, max(0, peak - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    options = parser.parse_args()
    texts = list(library_texts(20_000_000))
    num_bytes = sum(len(text.encode()) for text in texts)
    signature(texts[0])
    detect(texts[:1])
    for name, work in (("signatures", lambda: [signature(text) for text in texts]), ("languages", lambda: detect(texts))):
        _, seconds, _ = watched(work)
        rate = num_bytes / 1e6 / seconds
        print(f"{name}: {rate:.1f} MB/s, {seconds / len(texts) * 1e3:.2f} ms a text of {num_bytes // len(texts):,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), options.documents)
        for remove in ("none", "exact", "near"):
            found, seconds, peak = watched(lambda: select(Path(folder), data_of(["s"], remove=remove)))  # noqa: B023
            kept = sum(int(choice.kept.sum()) for choice in found.choices.values())
            print(
                f"{remove}: {seconds:.1f} s for {options.documents:,} documents, {kept:,} kept, "
                f"{peak / 1e6:.0f} MB ({peak / options.documents:.0f} bytes a document)"
            )


if __name__ == "__main__":
    main()
