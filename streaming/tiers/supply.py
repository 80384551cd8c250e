"""Keeps the shards of a run's next steps on its node's disk: what the prefetcher process does, but for its sockets.

``Schedule`` says what is fetched and what goes, ``Prefetch`` when; here threads carry that out, and readers wait for their
steps. All decisions are made under one lock. Whatever is unforeseen (a rank that joins late, a disk that has less room than it
had) leads to another plan, made of where the readers are and of what lies there.
"""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from outgrow.contracts import ShardCounts
from outgrow.errors import IntegrityError, OutgrowError, ShardError
from outgrow.streaming.selection import Split
from outgrow.streaming.tiers.copies import Copies
from outgrow.streaming.tiers.gate import Reads
from outgrow.streaming.tiers.messages import as_outgrow_error
from outgrow.streaming.tiers.needs import Int64
from outgrow.streaming.tiers.positions import Positions
from outgrow.streaming.tiers.prefetch import Prefetch
from outgrow.streaming.tiers.room import Room
from outgrow.streaming.tiers.schedule import Fetch, Foreseen, Schedule
from outgrow.streaming.tiers.tallies import Tallies

_JOIN_S = 30.0
"""How long nothing is given up for ranks that have yet to join; one that joins later waits for what is gone to come again."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTES_BYTES = 64 * 1024
"""What shards leave free of a disk that was full once: the counts are written there too, and files take whole blocks."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """A shard to be put in place: for ``fetch`` of ``prefetch``, or, where it has none, to stay."""

    shard: int
    fetch: Fetch | None = None
    prefetch: Prefetch | None = None


class Supply:
    """The shards of one run in one slot.

    ``windows`` int64 [shards] is the window of each shard, ``divide`` gives the room of so many bytes, and ``pinned`` are the
    shards that stay; ``present`` lie in the slot from before. ``parallel`` are fetched at once. Counts go on from ``counts``.
    """

    def __init__(
        self,
        needs: Foreseen,
        copies: Copies,
        *,
        windows: Int64,
        divide: Callable[[int], Room],
        pinned: Sequence[int],
        present: Sequence[int],
        reserve_bytes: int,
        parallel: int,
        counts: ShardCounts,
    ) -> None:
        self._changed = threading.Condition()
        self._copies = copies
        self._windows = windows
        self._divide = divide
        self._room = divide(copies.slot.room_bytes)
        self._reserve_bytes = reserve_bytes
        self._parallel = parallel
        self._tallies = Tallies(counts)
        self._needs = needs
        self._positions = Positions()
        self._expected = 0
        self._first_join = 0.0
        self._stop = 0
        self._prefetch: Prefetch | None = None
        self._present = {shard: False for shard in present if shard not in set(pinned)}
        self._due_pinned = set(pinned)
        self._pinned = frozenset(pinned)
        self._lost_pinned: OutgrowError | None = None
        self._lost: tuple[int, OutgrowError] | None = None
        self._elsewhere: dict[int, tuple[int, Path]] = {}
        self._moving: set[int] = set()
        self._jobs = deque(_Job(shard) for shard in pinned)
        for _ in range(parallel):
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    # --- what readers ask ---------------------------------------------------------------------------------------------

    def join(self, rank: int, seat: int, local_world: int, reads: Reads) -> None:
        """A rank reads from now on; the positions of ``local_world`` ranks are waited for before a shard is given up."""
        with self._changed:
            self._first_join = self._first_join or time.monotonic()
            self._expected = max(self._expected, local_world)
            self._positions.join(rank, seat, reads)
            first = min(reads.positions)
            if self._prefetch is None or first < self._prefetch.frontier or reads.stop > self._stop:
                self._stop = max(self._stop, reads.stop)
                self._plan(first if self._prefetch is None else min(first, self._prefetch.frontier))
            self._advance()

    def leave(self, rank: int, seat: int) -> None:
        """A rank reads no more."""
        with self._changed:
            self._positions.leave(rank, seat)
            self._advance()

    def acquire(self, rank: int, reader: int, step: int) -> dict[str, Path]:
        """Wait until every shard of a step can be read; paths by name of those that lie elsewhere than in the slot."""
        with self._changed:
            self._positions.reach(rank, reader, step)
            self._advance()
            began = time.monotonic()
            while not self._is_ready(step):
                self._changed.wait()
            self._tallies.wait_s += time.monotonic() - began
            return self._paths_elsewhere()

    def release(self, rank: int, reader: int, step: int) -> None:
        """A reader has left a step."""
        with self._changed:
            self._positions.leave_step(rank, reader, step)
            self._advance()

    def acquire_pinned(self) -> dict[str, Path]:
        """Wait for the shards that stay, as ``acquire`` does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._due_pinned)
            if self._lost_pinned is not None:
                raise self._lost_pinned
            return self._paths_elsewhere()

    def heal(self, stream: str, split: Split, number: int, step: int) -> dict[str, Path]:
        """Have shard ``number`` of a split, which a reader of ``step`` found damaged or gone, whole again; as ``acquire``."""
        shards = self._copies.shards
        shard = shards.number(shards.streams.index(stream), split, number)
        with self._alone(shard):
            with self._changed:
                has_place = self._has_place(shard)
                if has_place:
                    self._forget_elsewhere(shard)  # what was found damaged may lie there
            try:
                if has_place:
                    self._mend_or_read(shard, step)
                else:
                    self._read_elsewhere(shard, step, again=True)
            except Exception as error:
                raise self._told(shard, error) from None
            with self._changed:
                self._delete_if_given_up(shard)
                return self._paths_elsewhere()

    # --- what time brings ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look after what changes by itself: the room on the disk, and ranks that never came."""
        with self._changed:
            with self._noting_failure():
                free = self._copies.free_bytes
                if free < self._reserve_bytes and self._copies.num_bytes:
                    self._shrink(self._used_bytes + free - self._reserve_bytes)
            self._advance()

    def counts(self) -> ShardCounts:
        """What it has cost so far, and how it stands."""
        with self._changed:
            return self._tallies.told(
                queue=(self._prefetch.queue if self._prefetch else 0) + len(self._due_pinned),
                cache_bytes=self._used_bytes,
                room_bytes=self._room.total,
                tiers=self._copies.traffic.snapshot(),
            )

    # --- planning; the lock is held -----------------------------------------------------------------------------------

    @property
    def _used_bytes(self) -> int:
        pinned = self._copies.shards.num_bytes[sorted(self._pinned - self._due_pinned)].sum()
        return int(pinned) + (self._prefetch.used_bytes if self._prefetch else 0)

    def _plan(self, start: int) -> None:
        """Plan all anew from ``start`` on, which the plan before may have passed."""
        present = self._present
        if self._prefetch is not None:
            self._take_back(self._prefetch)
            present = self._prefetch.present()
        self._schedule = self._make_schedule(start, present)
        self._prefetch = Prefetch(
            self._schedule,
            self._copies.shards.num_bytes,
            windows=self._windows,
            room=self._room.unpinned,
            present=present,
            start=start,
        )
        if self._prefetch.used_bytes > self._room.unpinned:
            self._fit()

    def _make_schedule(self, start: int, present: Mapping[int, bool]) -> Schedule:
        self._tallies.plan_anew()
        sizes = self._copies.shards.num_bytes
        return Schedule(self._needs, sizes, capacity=self._room.planned, start=start, stop=self._stop, present=present)

    def _shrink(self, total: int) -> None:
        """Make do with so many bytes."""
        if total < self._room.total:
            self._room = self._divide(max(total, 0))
            self._fit()

    def _fit(self) -> None:
        if self._prefetch is not None:
            self._take_back(self._prefetch)
            self._schedule = self._make_schedule(self._prefetch.frontier, self._prefetch.present())
            self._prefetch.replan(self._schedule)

    def _take_back(self, prefetch: Prefetch) -> None:
        """Undo what is planned and has not begun, and delete what the room does not hold; another plan comes next."""
        last = prefetch.frontier - 1
        for shard in prefetch.shrink(self._room.unpinned, lambda shard: self._needs.next_step(shard, last, self._stop)):
            self._delete(shard)

    def _advance(self) -> None:
        """Begin what can be begun, now that readers or shards have come further."""
        if self._prefetch is not None:
            with self._noting_failure():
                self._follow(self._prefetch)
        self._changed.notify_all()

    def _follow(self, prefetch: Prefetch) -> None:
        waiting = self._positions.num_seen < self._expected and time.monotonic() < self._first_join + _JOIN_S
        reached = None if waiting else self._positions.frontier
        if reached is not None:
            prefetch.advance(reached)
        if not self._due_pinned:
            self._begin(prefetch)
        self._tallies.planned(self._schedule.planned, self._schedule.counts)
        self._tallies.reach(prefetch.frontier)
        for shard, (step, _) in list(self._elsewhere.items()):
            if step < prefetch.frontier - 1 and shard not in self._pinned:  # the next step may well need the same
                self._forget_elsewhere(shard)

    def _begin(self, prefetch: Prefetch) -> None:
        for fetch in prefetch.begin(parallel=self._parallel):
            for eviction in fetch.evict:
                self._delete(eviction.shard)
            self._jobs.append(_Job(fetch.shard, fetch, prefetch))

    def _delete(self, shard: int) -> None:
        self._copies.delete(shard)
        self._tallies.add("evictions")

    def _forget_elsewhere(self, shard: int) -> None:
        self._copies.close_elsewhere(shard)
        self._elsewhere.pop(shard, None)

    def _is_ready(self, step: int) -> bool:
        """Raises what keeps the step, or one before it, from ever being ready."""
        if self._lost is not None and step >= self._lost[0]:
            raise self._lost[1]
        prefetch = self._prefetch
        return prefetch is not None and (step < prefetch.frontier or prefetch.is_ready(step))

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """What keeps a plan from going on (a damaged window of the row index, a disk that fails) is told to all readers."""
        try:
            yield
        except Exception as error:
            self._lost = self._lost or (0, as_outgrow_error(error))

    def _delete_if_given_up(self, shard: int) -> None:
        """A copy that arrived when its place was given up already."""
        if not self._has_place(shard):
            self._copies.delete(shard)

    def _has_place(self, shard: int) -> bool:
        return shard in self._pinned or (self._prefetch is not None and shard in self._prefetch.present())

    def _paths_elsewhere(self) -> dict[str, Path]:
        return {self._copies.shards.file(shard).name: path for shard, (_, path) in self._elsewhere.items()}

    # --- carrying out; the lock is not held ---------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                job = self._jobs.popleft()
            error: Exception | None = None
            with self._alone(job.shard):
                try:
                    self._carry_out(job)
                except Exception as caught:
                    error = caught
            with self._changed:
                with self._noting_failure():
                    self._settle(job, error)
                self._advance()

    def _carry_out(self, job: _Job) -> None:
        if job.fetch is None:
            self._mend_or_read(job.shard, 0)
        elif job.fetch.through:
            self._read_elsewhere(job.shard, job.fetch.step)
        elif job.fetch.check:
            self._mend(job.shard)
        else:
            self._fetch(job.shard)

    def _mend(self, shard: int) -> None:
        """Leave a copy that is whole, and fetch one that is not."""
        if not self._copies.is_whole(shard):
            was_there = self._copies.delete(shard)
            self._fetch(shard)
            with self._changed:
                self._tallies.add("healed", was_there)

    def _mend_or_read(self, shard: int, step: int) -> None:
        """``_mend``, or where the disk is full ``_read_elsewhere``."""
        try:
            self._mend(shard)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._read_elsewhere(shard, step, again=True)

    def _fetch(self, shard: int) -> None:
        self._copies.obtain(shard)
        with self._changed:
            self._tallies.add("fetches")

    def _read_elsewhere(self, shard: int, step: int, *, again: bool = False) -> None:
        """Have a shard readable without a place in the slot until every reader has left ``step``; one that is so already is
        looked at ``again`` or not."""
        with self._changed:
            known = self._elsewhere.get(shard)
            if known is not None:
                step = max(step, known[0])
                self._elsewhere[shard] = (step, known[1])  # so that it is not forgotten meanwhile
        path = known[1] if known is not None and not again else self._copies.open_elsewhere(shard)
        with self._changed:
            self._elsewhere[shard] = (step, path)
            self._tallies.add("read_through", known is None)

    def _settle(self, job: _Job, error: Exception | None) -> None:
        """Say how a job ended; the lock is held."""
        fetch, prefetch = job.fetch, job.prefetch
        if fetch is None or prefetch is None:
            self._due_pinned.discard(job.shard)
            if error is not None:
                self._lost_pinned = self._told(job.shard, error)
            return
        if isinstance(error, OSError) and error.errno in _FULL:
            prefetch.failed(fetch)
            size = int(self._copies.shards.num_bytes[job.shard])
            left = self._used_bytes - size + self._copies.free_bytes - self._reserve_bytes - _NOTES_BYTES
            self._shrink(min(left, self._room.total - size))
        else:
            if error is not None and (self._lost is None or fetch.step < self._lost[0]):
                self._lost = (fetch.step, self._told(job.shard, error))
            prefetch.arrived(fetch)  # lost or not: the shards of the steps before are waited for
        self._delete_if_given_up(job.shard)

    def _told(self, shard: int, error: Exception) -> OutgrowError:
        """What a reader is told of a shard that cannot be had."""
        stream, split, number = self._copies.shards.locate(shard)
        if not isinstance(error, IntegrityError) or split != "train":
            return as_outgrow_error(error)
        return ShardError(error.message, stream=stream, shard=number, where=error.where, hint=error.hint)

    @contextmanager
    def _alone(self, shard: int) -> Iterator[None]:
        """Nobody else moves the shard meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: shard not in self._moving)
            self._moving.add(shard)
        try:
            yield
        finally:
            with self._changed:
                self._moving.remove(shard)
                self._changed.notify_all()
