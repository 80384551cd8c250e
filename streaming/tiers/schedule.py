"""What a run fetches, in which order, and what makes room for it: Belady's MIN over the steps, planned ahead of time.

Nothing is fetched before the step that needs it, in the plan: what is missing comes in when its step does, and what is needed
furthest in the future goes. Where all shards are of one size no plan fetches less (L. A. Belady, "A study of replacement
algorithms for a virtual-storage computer", 1966). That the fetches are carried out ahead of time, as early as room allows, does
not change what they are. Pure, and lazy: the same needs, sizes and residents give the same plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.streaming.tiers.needs import Visit

Int64: TypeAlias = npt.NDArray[np.int64]


class Foreseen(Protocol):
    """What a schedule asks of ``Needs``."""

    def visits(self, start: int, stop: int) -> Iterator[Visit]: ...

    def next_step(self, shard: int, after: int, stop: int) -> int | None: ...

    def latest_step(self, shard: int, after: int, stop: int) -> int | None:
        """An upper bound of ``next_step`` that costs little, None where that is; ``next_step`` itself is one."""


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """A shard that is given up: it can be deleted once every reader has left ``last_step``, the last that read it.

    That is ``start`` - 1 where none did.
    """

    shard: int
    last_step: int


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """A shard that must be in place before ``step``.

    evict    what makes room for it
    check    it lies in the slot from before, unverified: to be read and digested, not fetched
    through  there is no room for it even when all else is evicted: read in ``step`` without a place in the cache; where a
             later step needs it too, another fetch comes
    """

    shard: int
    step: int
    evict: tuple[Eviction, ...] = ()
    check: bool = False
    through: bool = False


@dataclass(kw_only=True)
class PlanCounts:
    """What has been planned so far. ``visits`` are ``hits`` and ``misses``; ``refetches`` are misses of what was there before.

    What is left of a visit whose shard was evicted, or read through, is another visit.
    """

    visits: int = 0
    hits: int = 0
    misses: int = 0
    refetches: int = 0
    evictions: int = 0


_Candidate: TypeAlias = tuple[int, int, int]
"""A shard that may go: minus its next step, minus its bytes, and its number; the first in order goes first."""
_STALE = 1000
"""Entries of shards that are no longer idle which a heap may hold beside as many as there are idle shards."""


class _Idle(NamedTuple):
    """A shard in the cache that no visit under way reads: its next step (``stop``: none) or, unless ``is_exact``, a bound of
    it, and the last step that has read it."""

    next_step: int
    is_exact: bool
    last_step: int


class Schedule(Iterator[Fetch]):
    """The fetches of steps [``start``, ``stop``) in order of need.

    ``num_bytes`` int64 [shards] are their sizes, of which ``capacity`` may be in the cache; ``present`` are the shards that lie
    there already, and whether they are verified. Where they are more than ``capacity``, the first that is missing evicts them.
    """

    def __init__(
        self, needs: Foreseen, num_bytes: Int64, *, capacity: int, start: int, stop: int, present: Mapping[int, bool]
    ) -> None:
        self.counts = PlanCounts()
        self._needs = needs
        self._num_bytes: list[int] = num_bytes.tolist()
        self._capacity, self._stop = capacity, stop
        self._visits = needs.visits(start, stop)
        self._coming: Visit | None = next(self._visits, None)
        self._left: list[tuple[int, int, Int64]] = []  # heap of visits' rests: first step, shard, steps
        self._planned = start
        self._fetches: deque[Fetch] = deque()
        self._unverified = {shard for shard, is_verified in present.items() if not is_verified}
        self._known = set(present)
        self._used = sum(self._num_bytes[shard] for shard in present)
        # Every shard in the cache is under way, idle or, until its next step is asked for, resting (with its last step).
        self._under_way: dict[int, Int64] = {}
        self._idle: dict[int, _Idle] = {}
        self._resting: dict[int, int] = dict.fromkeys(sorted(present), start - 1)
        self._ends: list[tuple[int, int]] = []  # heap: step and shard; the last of those under way, the next of the idle
        self._furthest: list[_Candidate] = []  # heap of the idle; what is no longer so is passed over

    @property
    def planned(self) -> int:
        """Every need of steps below this has been planned and given out; ``stop`` at the end."""
        return self._fetches[0].step if self._fetches else self._planned

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Fetch:
        """The next fetch. Where all is in place it plans up to the end of the run to find that there is none."""
        fetch = self.next_before(self._stop)
        if fetch is None:
            raise StopIteration
        return fetch

    def next_before(self, step: int) -> Fetch | None:
        """The next fetch of a step below ``step``; None where there is none, and then all below ``step`` is planned."""
        while not self._fetches and self._planned < min(step, self._stop):
            self._plan(self._planned)
            before, self._planned = self._planned, self._next_need()
            assert before < self._planned, "visits come in the order of their first steps"
        return self._fetches.popleft() if self._fetches and self._fetches[0].step < step else None

    # --- one step -----------------------------------------------------------------------------------------------------

    def _next_need(self) -> int:
        """The next step in which a visit begins or goes on; ``stop`` where there is none."""
        coming = int(self._coming.steps[0]) if self._coming else self._stop
        return min(coming, self._left[0][0]) if self._left else coming

    def _plan(self, step: int) -> None:
        """Plan what begins to be needed in ``step``; everything before is planned."""
        self._end_before(step)
        read_through: set[int] = set()
        for shard, steps in self._needs_of(step):
            self.counts.visits += 1
            in_cache = shard in self._under_way or shard in self._idle or shard in self._resting
            if in_cache or shard in read_through:
                self.counts.hits += 1
                if shard in self._unverified:
                    self._unverified.remove(shard)
                    self._fetches.append(Fetch(shard=shard, step=step, check=True))
            else:
                self.counts.misses += 1
                self.counts.refetches += shard in self._known
                self._known.add(shard)
                evict = self._make_room(shard, step)
                self._fetches.append(Fetch(shard=shard, step=step, evict=evict or (), through=evict is None))
                if evict is None:
                    read_through.add(shard)
                else:
                    self._used += self._num_bytes[shard]
            if shard not in read_through:
                self._read(shard, steps)
            elif len(steps) > 1:
                heappush(self._left, (int(steps[1]), shard, steps[1:]))

    def _needs_of(self, step: int) -> Iterator[tuple[int, Int64]]:
        """Shard and steps of the visits that go on or begin in ``step``."""
        while self._left and self._left[0][0] == step:
            _, shard, steps = heappop(self._left)
            yield shard, steps
        while self._coming is not None and self._coming.steps[0] == step:
            visit, self._coming = self._coming, next(self._visits, None)
            yield visit.shard, visit.steps

    def _read(self, shard: int, steps: Int64) -> None:
        """A shard in the cache is read in ``steps``."""
        self._idle.pop(shard, None)
        self._resting.pop(shard, None)
        self._under_way[shard] = steps
        heappush(self._ends, (int(steps[-1]), shard))

    def _end_before(self, step: int) -> None:
        """Let shards rest whose visits ended before ``step``, and those that were to be read before it and were not."""
        while self._ends and self._ends[0][0] < step:
            last, shard = heappop(self._ends)
            steps, idle = self._under_way.get(shard), self._idle.get(shard)
            if steps is not None and steps[-1] == last:
                del self._under_way[shard]
                self._resting[shard] = last
            elif idle is not None and idle.next_step == last:
                del self._idle[shard]
                self._resting[shard] = idle.last_step

    # --- room ---------------------------------------------------------------------------------------------------------

    def _make_room(self, shard: int, step: int) -> tuple[Eviction, ...] | None:
        """What goes so that ``shard`` fits, none of it read in ``step``; None where all else is not enough."""
        missing = self._used + self._num_bytes[shard] - self._capacity
        if missing <= 0:
            return ()
        self._foresee(step)
        waiting = self._waiting(step)
        victims: list[tuple[_Candidate, _Idle | None]] = []
        while missing > 0:
            idle = self._furthest_idle(step)
            if waiting and (idle is None or waiting[-1] < idle):
                victims.append((waiting.pop(), None))
            elif idle is not None and -idle[0] > step:
                victims.append((heappop(self._furthest), self._idle.pop(idle[2])))
            else:
                break
            missing += victims[-1][0][1]
        is_enough, spare = missing <= 0, -missing
        evicted = []
        for candidate, was_idle in reversed(victims):
            _, minus_bytes, victim = candidate
            if is_enough and spare + minus_bytes < 0:
                evicted.append(Eviction(shard=victim, last_step=was_idle.last_step if was_idle else self._cut(victim, step)))
                self._used += minus_bytes
                self._unverified.discard(victim)
                continue
            spare += minus_bytes  # the others are enough without it, or nothing is
            if was_idle:
                self._set_idle(victim, was_idle)
        self.counts.evictions += len(evicted)
        return tuple(reversed(evicted)) if is_enough else None

    def _waiting(self, step: int) -> list[_Candidate]:
        """The shards under way that ``step`` does not read, the first to go last."""
        found = []
        for shard, steps in self._under_way.items():
            next_step = int(steps[np.searchsorted(steps, step)])
            if next_step > step:
                found.append((-next_step, -self._num_bytes[shard], shard))
        return sorted(found, reverse=True)

    def _foresee(self, step: int) -> None:
        """Note when the resting shards are read again, in ``step`` or later."""
        for shard, last_step in sorted(self._resting.items()):
            latest = self._needs.latest_step(shard, step - 1, self._stop)
            self._set_idle(shard, _Idle(self._stop if latest is None else latest, latest is None, last_step))
        self._resting.clear()

    def _furthest_idle(self, step: int) -> _Candidate | None:
        """The idle shard that is read last, the first of the heap; its next step is known exactly, and is ``step`` or later."""
        while self._furthest:
            first = self._furthest[0]
            idle = self._idle.get(first[2])
            if idle is None or idle.next_step != -first[0]:
                heappop(self._furthest)  # read since
            elif idle.is_exact:
                return first
            else:
                heappop(self._furthest)
                exact = self._needs.next_step(first[2], step - 1, self._stop)
                self._set_idle(first[2], _Idle(self._stop if exact is None else exact, True, idle.last_step))
        return None

    def _set_idle(self, shard: int, idle: _Idle) -> None:
        self._idle[shard] = idle
        if not idle.is_exact:
            heappush(self._ends, (idle.next_step, shard))
        heappush(self._furthest, (-idle.next_step, -self._num_bytes[shard], shard))
        if len(self._furthest) > 2 * len(self._idle) + _STALE:
            self._furthest = [(-own.next_step, -self._num_bytes[other], other) for other, own in self._idle.items()]
            heapify(self._furthest)

    def _cut(self, shard: int, step: int) -> int:
        """End the visit of a shard under way before ``step``; what is left is a need of its own. The last step before."""
        steps = self._under_way.pop(shard)
        at = int(np.searchsorted(steps, step))
        heappush(self._left, (int(steps[at]), shard, steps[at:]))
        return int(steps[at - 1])
