"""Stores that hold document tables and no token: all that a row index reads where every loss weight is 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from outgrow.streaming.document_table import DocumentTable
from outgrow.streaming.manifest import commit
from outgrow.streaming.row_cuts import Borders
from outgrow.streaming.selection import Choice, Selection

Int64 = npt.NDArray[np.int64]


def table_of(lengths: Int64, *, borders: Borders | None = None, tokens_a_shard: int, first_shard: int = 0) -> DocumentTable:
    """Documents of these lengths, whose loss weights are all 1, in shards of about ``tokens_a_shard``."""
    counts = np.diff(borders.first) if borders else np.zeros(len(lengths))
    return DocumentTable(
        lengths=lengths,
        shard=(first_shard + (np.cumsum(lengths) - lengths) // tokens_a_shard).astype(np.int32),
        weight=(lengths - 1).astype(np.float64),
        uniform=np.ones(len(lengths), np.bool_),
        chars=4 * lengths,
        content=np.zeros((len(lengths), 2), np.uint64),
        border_counts=counts.astype(np.int32),
        borders=borders.tokens if borders else np.empty(0, np.int32),
    )


def write_table_store(folder: Path, streams: Mapping[str, Sequence[DocumentTable]]) -> None:
    """A committed store with these tables of the training split, and no held-out document."""
    for name, tables in streams.items():
        (folder / "streams" / name).mkdir(parents=True)
        for part, table in enumerate(tables):
            table.save(folder / "streams" / name / "train", part)
    commit(folder, "store.json", {"fingerprint": "tables", "streams": [{"name": name, "pairs": False} for name in streams]})


def keep_all(counts: Mapping[str, int]) -> Selection:
    """The choice that keeps the ``counts`` documents of each stream."""
    choices = {}
    for name, count in counts.items():
        choices[name, "train"] = _kept(count)
        choices[name, "validation"] = _kept(0)
    return Selection(names=tuple(counts), choices=choices)


def _kept(count: int) -> Choice:
    return Choice(
        reason=np.zeros(count, np.uint8),
        twin_stream=np.full(count, -1, np.int16),
        twin_validation=np.zeros(count, np.bool_),
        twin=np.full(count, -1, np.int64),
    )
