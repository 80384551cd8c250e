"""What one rank computes in each optimizer step, read from store and indexes: the work that loader workers do ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.contracts import Layout, Record
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.mix import Mix
from outgrow.streaming.documents import Documents
from outgrow.streaming.lost_shards import LostShard, lost_documents
from outgrow.streaming.manifest import FILES, STORE_MANIFEST, read_manifest
from outgrow.streaming.packing import PackedRows, pack
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.sampler import Sampler, validation_rows
from outgrow.streaming.selection import Split
from outgrow.streaming.tiers.gate import Gate
from outgrow.streaming.tiers.shard_list import split_folder

_NEIGHBOUR_SHARDS = 2
"""Shards that stay mapped beside those of one window, for the step that ends a window and begins the next."""


@dataclass(frozen=True, kw_only=True)
class IndexPlace(Record):
    """A row index on this node: its folder, and the fingerprint that the dataset's card gives."""

    folder: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ReadPlan(Record):
    """All that reading takes, as plain data for another process. ``store`` is a local folder; ``indexes`` are in the order of
    the dataset's card, by which ``mix`` counts them.

    ``gate`` is the folder in which the node's prefetcher is found, empty where the shards lie in ``store``; ``attempt`` names
    the start of the ranks, which it tells apart. Rows that touch a shard of ``lost`` are read as empty, and weigh nothing.
    """

    store: str
    indexes: tuple[IndexPlace, ...]
    mix: Mix
    layout: Layout
    rank: int
    seed: int
    fill_token: int
    gate: str = ""
    attempt: str = ""
    lost: tuple[LostShard, ...] = ()


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
    """The rows of one split of one index, packed for one rank; ``documents`` has those of each stream."""

    def __init__(self, plan: ReadPlan, index: RowIndex, split: Split, documents: Sequence[Documents]) -> None:
        self.plan = plan
        self.streams = index.streams(split)
        self.first_rows = index.first_rows(split)
        self._documents = documents

    def read(self, step: int, epoch: int, row_ids: Sequence[int]) -> PackedStep:
        """The rank's share of the ordered rows of a step."""
        weight, tokens = self._sums(np.asarray(row_ids, np.int64))
        return PackedStep(
            step=step,
            epoch=epoch,
            row_ids=tuple(row_ids),
            global_weight=weight,
            tokens=tokens,
            micro_batches=tuple(
                pack(rows, self.streams, self.first_rows, self._documents, fill_token=self.plan.fill_token)
                for rows in self.plan.layout.rank_rows(tuple(row_ids), self.plan.rank)
            ),
        )

    def close_replaced(self) -> None:
        """Unmap the shards whose copies are gone, or were changed."""
        for documents in self._documents:
            documents.close_replaced()

    def _sums(self, row_ids: npt.NDArray[np.int64]) -> tuple[float, int]:
        """Loss weights and tokens of all rows of a step."""
        owners = np.searchsorted(self.first_rows, row_ids, "right") - 1
        weight, tokens = 0.0, 0
        for owner in np.unique(owners).tolist():
            more = self.streams[owner].sums(row_ids[owners == owner] - self.first_rows[owner])
            weight, tokens = weight + more[0], tokens + more[1]
        return weight, tokens


class StepReader:
    """The training steps of one rank: in any order, or, where its shards are fetched, every n-th as reader ``reader`` of n."""

    def __init__(self, plan: ReadPlan, reader: int = 0) -> None:
        self._gate = open_gate(plan, reader)
        indexes = open_indexes(plan)
        # The indexes of a card are of one store.
        documents = _open_documents(plan, indexes[0], "train", self._gate)
        self._readers = [SplitReader(plan, index, "train", documents) for index in indexes]
        self._sampler = Sampler(indexes, plan.mix, plan.seed)

    def read(self, step: int) -> PackedStep:
        """Raises ``ShardError`` where no place has a shard of the step whole."""
        if self._gate is None:
            return self._read(step)
        self._gate.acquire(step)
        self._readers[0].close_replaced()
        packed = self._read(step)
        self._gate.release(step)
        return packed

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _read(self, step: int) -> PackedStep:
        phase = self._sampler.phase(step)
        return self._readers[phase.index].read(step, phase.epoch, self._sampler.row_ids(step))


def validation_reader(plan: ReadPlan, gate: Gate | None = None) -> SplitReader:
    """The held-out rows, of the first index; read through ``gate`` where there is one."""
    index = _open_index(plan, plan.indexes[0])
    return SplitReader(plan, index, "validation", _open_documents(plan, index, "validation", gate))


def validation_steps(reader: SplitReader, max_rows: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name of the stream and rows of each validation step: batches of the global size, stream after stream."""
    size = reader.plan.layout.global_rows
    steps = []
    for stream, first in zip(reader.streams, reader.first_rows.tolist(), strict=False):
        rows = [first + row for row in validation_rows(stream, max_rows)]
        steps += [(stream.name, tuple(rows[at : at + size])) for at in range(0, len(rows), size)]
    return steps


def open_gate(plan: ReadPlan, reader: int = 0) -> Gate | None:
    """The rank's way to the prefetcher; None where it reads in place."""
    return Gate(Path(plan.gate), rank=plan.rank, attempt=plan.attempt, reader=reader) if plan.gate else None


def open_indexes(plan: ReadPlan) -> list[RowIndex]:
    """The row indexes of the plan, in its order. Raises ``IntegrityError`` where one is not what the card names."""
    return [_open_index(plan, place) for place in plan.indexes]


def _open_index(plan: ReadPlan, place: IndexPlace) -> RowIndex:
    index = RowIndex.open(Path(place.folder), lost_documents(Path(plan.store), plan.lost))
    if index.facts.fingerprint != place.fingerprint:
        raise IntegrityError("the row index is another one than the dataset's card names", where=place.folder)
    if not index.facts.rows:
        raise DataError("the dataset has no training row", where=plan.store)
    return index


def _open_documents(plan: ReadPlan, index: RowIndex, split: Split, gate: Gate | None) -> list[Documents]:
    store = Path(plan.store)
    digests = read_manifest(store, STORE_MANIFEST)[FILES]
    open_shards = index.facts.window_shards + _NEIGHBOUR_SHARDS
    found = []
    for stream in index.streams(split):
        ways: dict[str, Any] = {}
        if gate is not None:
            ways = {"path_of": partial(_path, gate, stream.name, split), "heal": partial(gate.heal, stream.name, split)}
        found.append(Documents(store, stream.name, split, digests, open_shards=open_shards, **ways))
    return found


def _path(gate: Gate, stream: str, split: Split, name: str) -> Path:
    return gate.path(f"{split_folder(stream, split)}/{name}")
