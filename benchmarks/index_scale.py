"""Start-up, memory and reading with a row index of a million shards and ten milliard rows.

    python benchmarks/index_scale.py

The dataset is synthetic: its tables of shards and of windows are whole; the blobs and shards that the measured steps touch are
real (one that was made as a build makes it, copied or linked into each place); the rest of the file of rows is a hole. A fresh
process opens it as a rank of a run does, reads the first steps, and tells how long that took and what memory it held.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from token_stores import Dataset, data_of  # noqa: E402

from outgrow.contracts import DatasetCard, IndexCard, Layout, StreamCard  # noqa: E402
from outgrow.recipes.mix import Mix  # noqa: E402
from outgrow.storage import digest, file_digest  # noqa: E402
from outgrow.streaming.manifest import INDEX_MANIFEST, STORE_MANIFEST, commit  # noqa: E402
from outgrow.streaming.row_cuts import Borders  # noqa: E402
from outgrow.streaming.row_files import WindowTable, rows_file, save_table, windows_file  # noqa: E402
from outgrow.streaming.row_windows import Window, lay  # noqa: E402
from outgrow.streaming.rows import IndexFacts, RowIndex, SplitFacts, StreamRows  # noqa: E402
from outgrow.streaming.sampler import Sampler  # noqa: E402
from outgrow.streaming.shards import SHARDS, ShardEntry, ShardTable, shard_name  # noqa: E402
from outgrow.streaming.steps import IndexPlace, ReadPlan, StepReader  # noqa: E402
from outgrow.streaming.window_documents import WindowDocuments  # noqa: E402

LENGTH = 2048
WINDOW_SHARDS = 16
SEED = 0
LAYOUT = Layout(engine="fsdp2", world=64, replicate=1, shard=64, global_rows=512, micro_rows=8, accumulation=1)


@dataclass(frozen=True)
class Scale:
    """How large the dataset is: every window is like the first, which holds ``rows`` rows of ``documents`` documents."""

    windows: int
    rows: int
    documents: int
    tokens: int

    @property
    def facts(self) -> IndexFacts:
        split = SplitFacts(
            name="x",
            documents=self.windows * self.documents,
            tokens=self.windows * self.tokens,
            rows=self.windows * self.rows,
            fewest_rows=self.windows * self.rows,
            cuts=0,
            cuts_at_borders=0,
            sequential=False,
            pairs=False,
            dropped={},
        )
        return IndexFacts(
            fingerprint="scale",
            store_fingerprint="scale",
            sequence_length=LENGTH,
            window_shards=WINDOW_SHARDS,
            seed=SEED,
            train=(split,),
            validation=(),
        )

    @property
    def mix(self) -> Mix:
        (own,) = self.facts.train
        stream = StreamCard(
            name="x",
            documents=own.documents,
            tokens=own.tokens,
            rows=own.rows,
            validation_documents=0,
            validation_tokens=0,
            validation_rows=0,
            dropped={},
            source_bytes=0,
        )
        index = IndexCard(folder="s/rows", fingerprint="scale", sequence_length=LENGTH, streams=(stream,))
        card = DatasetCard(
            store="s",
            store_fingerprint="scale",
            tokenizer_fingerprint="t",
            vocab_size=60_000,
            eos_token_id=0,
            bytes=0,
            indexes=(index,),
        )
        data = data_of(["x"], sequence_length=LENGTH, window_shards=WINDOW_SHARDS)
        return Mix.of(Dataset(Path(), card, {}, SEED, data).recipe(rows=LAYOUT.global_rows), card)


# --- making -----------------------------------------------------------------------------------------------------------


def make(folder: Path, num_shards: int, rows_a_shard: int, steps: int) -> Scale:
    shards = folder / "streams/x/train"
    entry, lengths = write_shard(shards, rows_a_shard)
    window = lay_window(np.tile(lengths, WINDOW_SHARDS))
    scale = Scale(num_shards // WINDOW_SHARDS, window.num_rows, len(window.order), window.num_tokens)
    window_rows = np.arange(scale.windows + 1) * scale.rows
    needed = windows_of_steps(scale, window_rows, steps)

    one = ShardTable.of([entry])
    columns = {name: np.repeat(getattr(one, name), num_shards, 0) for name in ShardTable.__dataclass_fields__}
    ShardTable(**columns).save(shards)
    for number in needed:
        for shard in range(number * WINDOW_SHARDS, (number + 1) * WINDOW_SHARDS):
            if shard:
                os.link(shards / shard_name(0, compressed=False), shards / shard_name(shard, compressed=False))
    store = {"fingerprint": "scale", "streams": [{"name": "x", "pairs": False}]}
    commit(folder, STORE_MANIFEST, store, {f"streams/x/train/{SHARDS}": file_digest(shards / SHARDS)})

    rows = folder / "rows"
    rows.mkdir()
    size = len(window.encode())
    digests = np.zeros((scale.windows, 32), np.uint8)
    with open(rows / rows_file("x", "train"), "wb") as file:
        for number in needed:
            blob = replace(window, first=number * scale.documents).encode()
            digests[number] = np.frombuffer(bytes.fromhex(digest(blob)), np.uint8)
            file.seek(number * size)
            file.write(blob)
        file.truncate(size * scale.windows)
    name = windows_file("x", "train")
    save_table(WindowTable(offsets=np.arange(scale.windows + 1) * size, digest=digests, rows=window_rows), rows / name)
    commit(rows, INDEX_MANIFEST, scale.facts.to_dict(), {name: file_digest(rows / name)})
    return scale


def write_shard(folder: Path, num_rows: int) -> tuple[ShardEntry, npt.NDArray[np.int64]]:
    """Shard 0, of documents that fill so many rows: its entry, and the lengths of its documents."""
    from outgrow.streaming._mosaic import DocumentWriter

    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(400), 0.9, num_rows * 5), 2).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_rows * LENGTH)) + 1]
    with DocumentWriter(folder, vocab_size=60_000, compression="none", shard_bytes=2**31) as writer:
        for number, length in enumerate(lengths.tolist()):
            writer.write(rng.integers(0, 60_000, length), source=f"document {number}")
    return writer.shards[0], lengths


def lay_window(lengths: npt.NDArray[np.int64]) -> Window:
    none = np.zeros(len(lengths), np.int32)
    documents = WindowDocuments(
        number=0,
        first=0,
        lengths=lengths,
        weight=lengths - 1.0,
        uniform=np.ones(len(lengths), np.bool_),
        borders=Borders.of(none, none[:0]),
    )
    order = np.random.default_rng(0).permutation(len(lengths))
    return lay(documents, order, LENGTH, whole=False, sequential=False).window


def windows_of_steps(scale: Scale, window_rows: npt.NDArray[np.int64], steps: int) -> list[int]:
    """The windows that the first steps read."""

    def read(number: int) -> Window:
        raise AssertionError("the order of rows needs no window")

    stream = StreamRows(name="x", sequence_length=LENGTH, window_rows=window_rows, read=read)
    sampler = Sampler([RowIndex(scale.facts, (stream,), ())], scale.mix, SEED)
    rows = np.array([row for step in range(steps) for row in sampler.row_ids(step)])
    windows: list[int] = np.unique(np.searchsorted(window_rows, rows, "right") - 1).tolist()
    return windows


# --- measuring --------------------------------------------------------------------------------------------------------


def memory_mb() -> str:
    """Anonymous memory now, and the most that was ever held with what files are mapped."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, peak = (int(status[name].split()[0]) / 1024 for name in ("RssAnon", "VmHWM"))
    return f"{anonymous:,.0f} | {peak:,.0f}"


def measure(folder: Path, scale: Scale, steps: int) -> None:
    rows = [("Python, numpy and our modules", 0.0, memory_mb())]
    start = time.perf_counter()

    def done(what: str) -> None:
        nonlocal start
        rows.append((what, time.perf_counter() - start, memory_mb()))
        start = time.perf_counter()

    index = RowIndex.open(folder / "rows")
    done("open the index")
    sampler = Sampler([index], scale.mix, SEED)
    done("make mix and sampler")
    sampler.row_ids(10**6)
    done("rows of step 1,000,000")
    plan = ReadPlan(
        store=str(folder),
        indexes=(IndexPlace(folder=str(folder / "rows"), fingerprint="scale"),),
        mix=scale.mix,
        layout=LAYOUT,
        rank=0,
        seed=SEED,
        fill_token=0,
    )
    reader = StepReader(plan)
    done("open all that a loader worker reads")
    reader.read(0)
    done("first step, its shards checked")
    tokens = sum(reader.read(step).tokens for step in range(1, steps))
    done(f"{steps - 1:,} steps more")
    assert tokens > 0.9 * (steps - 1) * LAYOUT.global_rows * LENGTH
    print("| | seconds | anonymous memory, MB | peak with mapped files, MB |\n|---|---|---|---|")
    for what, seconds, memory in rows:
        print(f"| {what} | {seconds:.2f} | {memory} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rows-a-shard", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--made", nargs=5, metavar=("FOLDER", "WINDOWS", "ROWS", "DOCUMENTS", "TOKENS"))
    options = parser.parse_args()
    if options.made:
        measure(Path(options.made[0]), Scale(*map(int, options.made[1:])), options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        scale = make(Path(folder), options.shards, options.rows_a_shard, options.steps)
        facts = scale.facts
        print(
            f"{options.shards:,} shards, {scale.windows:,} windows, {facts.rows:,} rows, {facts.train[0].documents:,} documents"
        )
        print(
            f"Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}\n", flush=True
        )
        made = [folder, *map(str, (scale.windows, scale.rows, scale.documents, scale.tokens))]
        subprocess.run([sys.executable, __file__, "--steps", str(options.steps), "--made", *made], check=True)


if __name__ == "__main__":
    main()
