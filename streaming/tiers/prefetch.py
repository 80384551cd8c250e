"""Which fetches of a schedule run now: a state machine without clock, disk or thread, for the prefetcher and the simulator.

A schedule says what is fetched and what makes room for it, in the order of need. Here each fetch begins as early as the room
allows: what it replaces may still be read, so beside the planned shards there is room to read ahead (``room`` divides it).
Fetches are *admitted* in the order of the schedule, and one that is admitted has its room. So none takes the room of one that
is needed sooner, and the first that is wanting can always be admitted: by the time that every reader waits for its step, all
that it replaces has been left. In which order the admitted ones begin is then free, and chosen to spare a disk's head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.streaming.tiers.schedule import Eviction, Fetch, Schedule

Int64: TypeAlias = npt.NDArray[np.int64]

_ADMITTED = 256
"""Fetches that have their room and wait for their turn, at most: each turn looks through them."""
_AHEAD_STEPS = 1024
"""Steps beyond the frontier that are always planned: further than any reader reads ahead."""
_STRIDE_STEPS = 64
_VISITS_A_CALL = 1000
"""Where all is in place, a call plans so many visits ahead and no more, so that none takes long."""


class Prefetch:
    """The fetches of one schedule, under way for readers of the steps from ``start`` on.

    ``num_bytes`` and ``windows``, int64 [shards], are the size of each shard and the number of its window; ``room`` is what may
    lie in the slot at any time, bytes; ``present`` are the shards that lie there from before, as for the schedule. ``frontier``
    is the lowest step that some reader has not left.
    """

    def __init__(
        self,
        schedule: Schedule,
        num_bytes: Int64,
        *,
        windows: Int64,
        room: int,
        present: Mapping[int, bool],
        start: int,
    ) -> None:
        self.frontier = start
        self._schedule = schedule
        self._num_bytes = num_bytes
        self._windows = windows
        self._room = room
        self._horizon = start  # planning has been asked for up to here
        self._held = set(present)  # lies in the slot, or has its room there
        self._used = sum(int(num_bytes[shard]) for shard in self._held)
        self._whole = set(present)  # of those held: lies there
        self._unverified = {shard for shard, is_verified in present.items() if not is_verified}
        self._given_up: list[tuple[int, int]] = []  # heap of (last step, shard): to be deleted once that step is left
        self._deleted: list[Eviction] = []  # no longer held, and told with the next fetch that begins
        self._next: Fetch | None = None  # the first of the schedule that has no room yet
        self._admitted: list[Fetch] = []  # in the order of their steps
        self._running: list[Fetch] = []
        self._inherited: list[Fetch] = []  # running since before the last ``replan``, so needed by any step
        self._last = -1  # the shard that was begun last
        self._admit()

    @property
    def used_bytes(self) -> int:
        """Bytes of the shards that lie in the slot or have their room there."""
        return self._used

    @property
    def queue(self) -> int:
        """Fetches that are due or running."""
        return len(self._admitted) + len(self._running) + (self._next is not None)

    def is_ready(self, step: int) -> bool:
        """Whether every shard of a step that some reader has not left lies in place, or is read through."""
        assert step >= self.frontier, "what a step needed may be gone once every reader has left it"
        due = [*self._admitted[:1], *self._running, *([self._next] if self._next else ())]
        return not self._inherited and step < self._schedule.planned and all(fetch.step > step for fetch in due)

    # --- what the caller does -----------------------------------------------------------------------------------------

    def begin(self, *, parallel: int) -> list[Fetch]:
        """Fetches to start now, so that at most ``parallel`` run at once; the ``evict`` of each is deleted before it starts.

        Those that the frontier waits for come first. Else the window of the one before is finished, then comes that of the one
        needed next; within a window shards are read in the order of their numbers, as they lie on the disk.
        """
        begun = []
        while len(self._running) < parallel and (fetch := self._choice()) is not None:
            self._admitted.remove(fetch)
            self._last = fetch.shard
            if fetch.check:
                self._whole.remove(fetch.shard)  # not deleted while it is read
            begun.append(replace(fetch, evict=tuple(self._deleted)))
            self._running.append(begun[-1])
            self._deleted.clear()
            self._admit()
        return begun

    def arrived(self, fetch: Fetch) -> None:
        """A fetch that ``begin`` gave is over, and its shard whole."""
        self._end(fetch)
        if not fetch.through:
            self._whole.add(fetch.shard)
            self._unverified.discard(fetch.shard)
        self._admit()

    def failed(self, fetch: Fetch) -> None:
        """A fetch that ``begin`` gave is over without its shard, and nothing is left of it: it will be given again."""
        step = min(fetch.step, self.frontier) if fetch in self._inherited else fetch.step
        self._end(fetch)
        if not fetch.through:
            self._whole.discard(fetch.shard)
        self._admitted.append(replace(fetch, step=step, evict=(), check=False))  # its room is still taken
        self._admitted.sort(key=lambda other: other.step)

    def advance(self, frontier: int) -> None:
        """Every reader has left all steps below ``frontier``."""
        if frontier > self.frontier:
            self.frontier = frontier
            self._admit()

    # --- less room ----------------------------------------------------------------------------------------------------

    def shrink(self, room: int, next_step: Callable[[int], int | None]) -> list[int]:
        """Take back all that has not begun, and say which shards to delete at once so that the others take at most ``room``
        bytes. ``replan`` comes next.

        ``next_step`` gives the first step from the frontier on that reads a shard. What is read last goes first; what the
        frontier reads stays, and what is being fetched. A reader further ahead may find a shard gone, and asks for its step
        anew.
        """
        self._room = room
        self._take_back()
        steps = {shard: next_step(shard) for shard in self._held - self._coming()}
        order = sorted(steps, key=lambda shard: (steps[shard] is None, steps[shard] or 0, self._num_bytes[shard], shard))
        gone: list[int] = []
        while self._used > room and order and steps[order[-1]] != self.frontier:
            gone.append(order.pop())
            self._drop(gone[-1])
        return gone

    def present(self) -> dict[int, bool]:
        """The shards that lie in the slot or are being fetched: whether each was found whole, or is being made so."""
        waiting = {fetch.shard for fetch in self._admitted if not fetch.check and not fetch.through}
        deleted = {eviction.shard for eviction in self._deleted}  # the caller has not been told, so it lies there
        doubtful = (self._unverified | deleted) - self._coming()
        return {shard: shard not in doubtful for shard in (self._held - waiting) | deleted}

    def replan(self, schedule: Schedule) -> None:
        """Go on by another schedule, made for the steps from ``frontier`` on, and for what is ``present`` after ``shrink``."""
        self._schedule = schedule
        self._horizon = self.frontier
        self._inherited = self._running.copy()
        self._admit()

    # --- steps --------------------------------------------------------------------------------------------------------

    def _choice(self) -> Fetch | None:
        """The admitted fetch to begin now. One that is read through takes memory, so it waits until its step is read."""
        free = [fetch for fetch in self._admitted if fetch.step <= self.frontier or not fetch.through]
        if not free:
            return None
        due = [fetch for fetch in free if fetch.step <= self.frontier]
        last = self._windows[self._last] if self._last >= 0 else -1
        begun = [fetch for fetch in free if self._windows[fetch.shard] == last]
        first = self._windows[free[0].shard]
        turn = due or begun or [fetch for fetch in free if self._windows[fetch.shard] == first]
        return min(turn, key=lambda fetch: (fetch.shard < self._last, fetch.shard))

    def _admit(self) -> None:
        """Give their room to as many fetches of the schedule as there is room for."""
        self._delete()
        while len(self._admitted) < _ADMITTED:
            if self._next is None:
                self._next = self._planned()
                if self._next is None:
                    return
                for eviction in self._next.evict:
                    heappush(self._given_up, (eviction.last_step, eviction.shard))
                self._delete()
            fetch = self._next
            if not fetch.check and not fetch.through:
                size = int(self._num_bytes[fetch.shard])
                if fetch.shard in self._held or self._used + size > self._room:
                    return
                self._held.add(fetch.shard)
                self._used += size
            self._admitted.append(fetch)
            self._next = None

    def _planned(self) -> Fetch | None:
        """The next fetch of the schedule; None where there is none, or none that is needed soon."""
        before = self._schedule.counts.visits
        while True:
            fetch = self._schedule.next_before(self._horizon)
            if fetch is not None or self._schedule.planned < self._horizon:
                return fetch
            if self._horizon > self.frontier + _AHEAD_STEPS and self._schedule.counts.visits >= before + _VISITS_A_CALL:
                return None
            self._horizon = max(self._horizon, self._schedule.planned) + _STRIDE_STEPS

    def _delete(self) -> None:
        """Take their room from shards that were given up and that every reader has left."""
        while self._given_up and self._given_up[0][0] < self.frontier and self._given_up[0][1] in self._whole:
            last_step, shard = heappop(self._given_up)
            self._drop(shard)
            self._deleted.append(Eviction(shard=shard, last_step=last_step))

    def _drop(self, shard: int) -> None:
        self._held.remove(shard)
        self._whole.discard(shard)
        self._unverified.discard(shard)
        self._used -= int(self._num_bytes[shard])

    def _coming(self) -> set[int]:
        """The shards that are being brought to their place, or checked there."""
        return {fetch.shard for fetch in self._running if not fetch.through}

    def _end(self, fetch: Fetch) -> None:
        self._running.remove(fetch)
        if fetch in self._inherited:
            self._inherited.remove(fetch)

    def _take_back(self) -> None:
        """As if nothing were planned: what has not begun has no room, and what was not deleted yet lies there."""
        present = self.present()
        self._held = set(present)
        self._used = sum(int(self._num_bytes[shard]) for shard in present)
        self._whole = self._held - self._coming()
        self._unverified = {shard for shard, is_verified in present.items() if not is_verified}
        self._admitted, self._next, self._given_up, self._deleted = [], None, [], []
