"""Needs that are made up: which steps read which shard, listed instead of worked out from a dataset."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from outgrow.streaming.tiers.needs import Visit


class ListedNeeds:
    """Visits as given: each a shard and the steps that read it."""

    def __init__(self, visits: Sequence[tuple[int, Sequence[int]]]) -> None:
        self._visits = visits
        self._steps: defaultdict[int, list[int]] = defaultdict(list)
        self._shards: defaultdict[int, set[int]] = defaultdict(set)
        for shard, steps in self._visits:
            self._steps[shard] += steps
            for step in steps:
                self._shards[step].add(shard)
        for every in self._steps.values():
            every.sort()

    def visits(self, start: int, stop: int) -> Iterator[Visit]:
        cut = [(shard, [step for step in steps if start <= step < stop]) for shard, steps in self._visits]
        for shard, steps in sorted((visit for visit in cut if visit[1]), key=lambda visit: visit[1][0]):
            yield Visit(shard=shard, steps=np.array(steps, np.int64))

    def next_step(self, shard: int, after: int, stop: int) -> int | None:
        later = self._steps[shard][bisect_right(self._steps[shard], after) :][:1]
        return later[0] if later and later[0] < stop else None

    latest_step = next_step

    def shards(self, step: int) -> set[int]:
        """What a step reads."""
        return self._shards[step]


def shuffled_windows(
    seed: int, *, windows: int, window_shards: int, passes: int, steps_a_window: int
) -> tuple[ListedNeeds, int]:
    """Passes over windows in a new order each, and the number of steps. The shards of a window are read in random steps of its
    stretch, and the step that ends one window begins the next."""
    rng = np.random.default_rng(seed)
    visits: list[tuple[int, list[int]]] = []
    first = 0
    for _ in range(passes):
        for window in rng.permutation(windows).tolist():
            stretch = np.arange(first, first + steps_a_window + 1)
            for shard in range(window * window_shards, (window + 1) * window_shards):
                read = rng.random(len(stretch)) < 0.7
                read[int(rng.integers(len(stretch)))] = True
                visits.append((shard, stretch[read].tolist()))
            first += steps_a_window
    return ListedNeeds(visits), first + 1
