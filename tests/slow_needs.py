"""Slow twin of ``streaming.tiers.needs``: which steps read which shard, by looking up every row of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from token_stores import Dataset

from outgrow.recipes.mix import Mix
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.sampler import Sampler
from outgrow.streaming.tiers.needs import Needs
from outgrow.streaming.tiers.shard_list import ShardList

Visits: TypeAlias = list[tuple[int, list[int]]]
"""Shard and steps of every visit."""


@dataclass(frozen=True)
class Run:
    """A dataset as a run of ``steps`` steps reads it; ``lost`` are documents that it has given up."""

    indexes: list[RowIndex]
    mix: Mix
    shards: ShardList
    seed: int
    steps: int

    @classmethod
    def of(cls, dataset: Dataset, steps: int, lost: Mapping[str, Sequence[range]] | None = None, **recipe: Any) -> Run:
        indexes = [RowIndex.open(dataset.root / index.folder, lost) for index in dataset.card.indexes]
        mix = Mix.of(dataset.recipe(**recipe), dataset.card)
        return cls(indexes, mix, ShardList.open(dataset.store, mix.streams), dataset.seed, steps)

    @property
    def needs(self) -> Needs:
        return Needs(self.indexes, self.mix, self.seed, self.shards)

    def visits(self, start: int = 0, stop: int | None = None) -> Visits:
        """Slow twin of ``Needs.visits``: each row of each step is looked up, span by span."""
        sampler = Sampler(self.indexes, self.mix, self.seed)
        ends = [self.shards.documents(stream, "train") for stream in range(len(self.mix.streams))]
        found: dict[tuple[int, ...], list[int]] = {}
        for step in range(start, self.steps if stop is None else stop):
            phase = self.mix.phase(step)
            index = self.indexes[phase.index]
            firsts = index.first_rows("train").tolist()
            for (stream, place), row in zip(self.mix.rows(step), sampler.row_ids(step), strict=True):
                rows = index.train[stream]
                for span in rows.spans(row - firsts[stream]):
                    own = int(np.searchsorted(ends[stream], span.document, "right"))
                    shard = self.shards.number(stream, "train", own)
                    steps = found.setdefault((phase.first_step, stream, place // rows.num_rows, shard), [])
                    if step not in steps[-1:]:
                        steps.append(step)
        return [(key[-1], steps) for key, steps in found.items()]

    def reads(self) -> list[frozenset[int]]:
        """The shards that each step reads."""
        found: list[set[int]] = [set() for _ in range(self.steps)]
        for shard, steps in self.visits():
            for step in steps:
                found[step].add(shard)
        return [frozenset(own) for own in found]
