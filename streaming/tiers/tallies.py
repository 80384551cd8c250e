"""What supplying a run's shards has cost.

A plan runs far ahead of the readers. What it counts is counted as they come to it, so that a plan which is made anew, here or
by the next process, counts nothing twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from outgrow.contracts import ShardCounts, TierTraffic
from outgrow.streaming.tiers.schedule import PlanCounts

_PLANNED = ("visits", "hits", "misses", "refetches")
_DONE = ("fetches", "evictions", "healed", "read_through")


class Tallies:
    """Counts that go on from those of ``before``."""

    def __init__(self, before: ShardCounts) -> None:
        self._before = before
        self._ahead: deque[tuple[int, PlanCounts]] = deque()
        self._reached = PlanCounts()
        self._done = dict.fromkeys((*_PLANNED, *_DONE), 0)
        self.wait_s = 0.0

    def planned(self, step: int, counts: PlanCounts) -> None:
        """A plan has counted so much up to ``step``."""
        if self._ahead and self._ahead[-1][0] == step:
            self._ahead.pop()
        self._ahead.append((step, replace(counts)))

    def reach(self, step: int) -> None:
        """Every reader has left the steps before ``step``."""
        while self._ahead and self._ahead[0][0] <= step:
            self._reached = self._ahead.popleft()[1]

    def plan_anew(self) -> None:
        """What is ahead will be planned again, and counted from nought."""
        for name in _PLANNED:
            self._done[name] += getattr(self._reached, name)
        self._ahead.clear()
        self._reached = PlanCounts()

    def add(self, name: str, count: int = 1) -> None:
        """``fetches``, ``evictions``, ``healed`` or ``read_through``, as they are done."""
        self._done[name] += count

    def told(self, *, queue: int, cache_bytes: int, room_bytes: int, tiers: Mapping[str, TierTraffic]) -> ShardCounts:
        """All counts, and how things stand."""
        counts = {name: getattr(self._before, name) + self._done[name] for name in (*_PLANNED, *_DONE)}
        for name in _PLANNED:
            counts[name] += getattr(self._reached, name)
        return ShardCounts(
            **counts,
            run=self._before.run,
            queue=queue,
            cache_bytes=cache_bytes,
            room_bytes=room_bytes,
            wait_s=self._before.wait_s + self.wait_s,
            tiers=dict(tiers),
        )
