"""What one rank computes in each optimizer step, read from store and index: the work that loader workers do ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outgrow.contracts import Layout, Record
from outgrow.errors import DataError, IntegrityError
from outgrow.streaming.documents import Documents
from outgrow.streaming.manifest import FILES, read_manifest
from outgrow.streaming.packing import PackedRows, pack
from outgrow.streaming.rows import STORE_MANIFEST, RowIndex, Split
from outgrow.streaming.sampler import Sampler, validation_rows


@dataclass(frozen=True, kw_only=True)
class ReadPlan(Record):
    """All that reading takes, as plain data for another process. ``store`` and ``index`` are local folders."""

    store: str
    index: str
    index_fingerprint: str
    layout: Layout
    rank: int
    seed: int
    fill_token: int


@dataclass(frozen=True, kw_only=True)
class PackedStep:
    """``contracts.StepRows`` with numpy arrays."""

    step: int
    epoch: int
    row_ids: tuple[int, ...]
    global_weight: float
    tokens: int
    micro_batches: tuple[PackedRows, ...]


class SplitReader:
    """The rows of one split, packed for one rank."""

    def __init__(self, plan: ReadPlan, split: Split) -> None:
        self.index = _open_index(plan)
        self.plan = plan
        self.streams = self.index.streams(split)
        self.first_rows = self.index.first_rows(split)
        self._weights = self.index.weights(split)
        self._tokens = self.index.tokens(split)
        digests = read_manifest(Path(plan.store), STORE_MANIFEST)[FILES]
        # A window's rows touch all of its shards; the rows at its ends reach into the neighbours.
        open_shards = self.index.facts.window_shards + 2
        self._documents = [
            Documents(Path(plan.store), stream.name, split, digests, open_shards=open_shards) for stream in self.streams
        ]

    def read(self, step: int, epoch: int, row_ids: Sequence[int]) -> PackedStep:
        """The rank's share of the ordered rows of a step."""
        ids = np.asarray(row_ids, np.int64)
        return PackedStep(
            step=step,
            epoch=epoch,
            row_ids=tuple(row_ids),
            global_weight=float(self._weights[ids].sum()),
            tokens=int(self._tokens[ids].sum()),
            micro_batches=tuple(
                pack(rows, self.streams, self.first_rows, self._documents, fill_token=self.plan.fill_token)
                for rows in self.plan.layout.rank_rows(tuple(row_ids), self.plan.rank)
            ),
        )


class StepReader:
    """The training steps of one rank, in any order."""

    def __init__(self, plan: ReadPlan) -> None:
        self._rows = SplitReader(plan, "train")
        self._sampler = Sampler(self._rows.index, seed=plan.seed, global_rows=plan.layout.global_rows)

    def read(self, step: int) -> PackedStep:
        return self._rows.read(step, self._sampler.epoch(step), self._sampler.row_ids(step))


def validation_steps(reader: SplitReader, max_rows: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name of the stream and rows of each validation step: batches of the global size, stream after stream."""
    size = reader.plan.layout.global_rows
    steps = []
    for stream, first in zip(reader.streams, reader.first_rows.tolist(), strict=False):
        rows = [first + row for row in validation_rows(stream, max_rows)]
        steps += [(stream.name, tuple(rows[at : at + size])) for at in range(0, len(rows), size)]
    return steps


def _open_index(plan: ReadPlan) -> RowIndex:
    index = RowIndex.open(Path(plan.index))
    if index.facts.fingerprint != plan.index_fingerprint:
        raise IntegrityError("the row index is another one than the dataset's card names", where=plan.index)
    if not index.facts.rows:
        raise DataError("the dataset has no training row", where=plan.store)
    return index
