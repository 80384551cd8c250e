"""Slow twins of the schedule: caches that go through a run step by step, and look up what comes next in all steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

Steps = Sequence[frozenset[int]]
"""The shards that each step reads."""
Choice = Callable[["SlowCache", int, list[int]], int]
"""The shard to evict in a step, of those that may go."""


@dataclass
class SlowCache:
    """A cache of ``capacity`` bytes that fetches what a step misses when the step comes."""

    steps: Steps
    num_bytes: Sequence[int]
    capacity: int
    held: set[int] = field(default_factory=set)
    last_read: dict[int, int] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reads: dict[int, list[int]] = {}
        for step, needed in enumerate(self.steps):
            for shard in needed:
                self._reads.setdefault(shard, []).append(step)

    def next_step(self, shard: int, after: int) -> int:
        """The first step after ``after`` that reads a shard; as many as there are steps where none does."""
        reads = self._reads.get(shard, [])
        at = bisect_right(reads, after)
        return reads[at] if at < len(reads) else len(self.steps)

    @property
    def fetched_bytes(self) -> int:
        return sum(self.num_bytes[shard] for shard in self.fetched)

    def run(self, evict: Choice) -> SlowCache:
        """Go through all steps; what does not fit beside the others of its step is read without a place."""
        for step, needed in enumerate(self.steps):
            for shard in sorted(needed):
                if shard not in self.held:
                    self.fetched.append(shard)
                    kept = sum(self.num_bytes[own] for own in self.held & needed)
                    if kept + self.num_bytes[shard] > self.capacity:
                        continue
                    while sum(self.num_bytes[own] for own in self.held) + self.num_bytes[shard] > self.capacity:
                        self.held.remove(evict(self, step, sorted(self.held - needed)))
                    self.held.add(shard)
                self.last_read[shard] = step
        return self


def furthest(cache: SlowCache, step: int, shards: list[int]) -> int:
    """Belady's MIN: what is read furthest in the future; never again is furthest."""
    return max(shards, key=lambda shard: cache.next_step(shard, step))


def least_recent(cache: SlowCache, step: int, shards: list[int]) -> int:
    """LRU."""
    return min(shards, key=lambda shard: cache.last_read.get(shard, -1))


def largest_and_furthest(cache: SlowCache, step: int, shards: list[int]) -> int:
    """The size-aware greedy with full knowledge: what takes most room for longest, as bytes times steps until it is read again
    (D. S. Berger et al., "Practical bounds on optimal caching with variable object sizes", 2018); never again is longest."""

    def weight(shard: int) -> float:
        again = cache.next_step(shard, step)
        return cache.num_bytes[shard] * (again - step) if again < len(cache.steps) else math.inf

    return max(shards, key=weight)


def least_bytes(steps: Steps, num_bytes: Sequence[int], capacity: int, held: Iterable[int] = ()) -> int:
    """The least that any plan fetches: every content that the cache can have after each step is tried. All that a step reads
    must fit."""
    costs = {frozenset(held): 0}
    for needed in steps:
        after: dict[frozenset[int], int] = {}
        for content, cost in costs.items():
            total = cost + sum(num_bytes[shard] for shard in needed - content)
            others = sorted(content - needed)
            for count in range(len(others) + 1):
                for stay in combinations(others, count):
                    kept = needed | set(stay)
                    if sum(num_bytes[shard] for shard in kept) <= capacity:
                        after[kept] = min(total, after.get(kept, total))
        costs = after
    return min(costs.values())
