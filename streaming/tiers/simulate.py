"""What reading a run's shards through a cache will cost, forecast on a virtual clock: no shard is read.

The plan is that of the run: the same needs, schedule and state machine. Only the rest is modelled: the tier that shards come
from gives so many bytes a second to all files together, after a pause before each; a step takes so long on the device; the
loader reads a few steps ahead of it. What the fast tier takes to write and read is not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.contracts import Record
from outgrow.streaming.tiers.needs import Visit
from outgrow.streaming.tiers.prefetch import Prefetch
from outgrow.streaming.tiers.room import Room
from outgrow.streaming.tiers.schedule import Fetch, Foreseen, Schedule

Int64: TypeAlias = npt.NDArray[np.int64]

_TRIALS = 7
"""A cache that is enough is told to a hundredth of where it may lie."""


@dataclass(frozen=True, kw_only=True)
class Source(Record):
    """The tier that shards are fetched from: bytes a second over all files that are read at once, seconds before the first byte
    of each, and how many are read at once."""

    name: str
    bytes_per_s: float
    latency_s: float
    parallel: int

    def seconds(self, num_bytes: int, files: int) -> float:
        """What it takes to read so much in one go; of files read at once, one flows while another has yet to begin."""
        flow_s = num_bytes / self.bytes_per_s
        return max(flow_s, (flow_s + files * self.latency_s) / self.parallel)


@dataclass(frozen=True, kw_only=True)
class Pace(Record):
    """``step_s`` is how long a step takes with its rows at hand, ``ahead_steps`` how far loader workers read ahead of it: 0
    where the rank reads by itself."""

    step_s: float
    ahead_steps: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Workload:
    """The steps [0, ``stop``) of a run: what they need, sizes and windows of the shards (int64 [shards]), the shards that stay
    for validation, and how a cache of so many bytes is divided."""

    needs: Foreseen
    num_bytes: Int64
    windows: Int64
    pinned: Sequence[int]
    stop: int
    divide: Callable[[int], Room]

    def beginning(self, stop: int) -> Workload:
        """The steps [0, ``stop``), with what they need kept in memory: for a short run that is simulated again and again."""
        return replace(self, needs=_Listed(list(self.needs.visits(0, stop))), stop=stop)


@dataclass(frozen=True, kw_only=True)
class Forecast(Record):
    """Of ``steps`` steps. A visit is one pass of the order over one shard: a hit where it lay in the cache, else a miss.

    ``fetched_bytes`` come from the source in ``fetches``, of which ``through`` found no place in the cache. The run waits
    ``start_s`` for its first step and ``stall_s`` at later ones; ``source_s`` is what the source takes for all that is
    fetched, without a pause.
    """

    steps: int
    visits: int
    hits: int
    misses: int
    refetches: int
    evictions: int
    fetches: int
    through: int
    fetched_bytes: int
    start_s: float
    stall_s: float
    source_s: float
    total_s: float

    @property
    def stall_share(self) -> float:
        """Of the time from the first step on."""
        return self.stall_s / (self.total_s - self.start_s)

    @property
    def load(self) -> float:
        """What is fetched while the steps compute, in proportion to what the source can read meanwhile: above 1 it cannot keep
        up, whatever is planned."""
        return self.source_s / (self.total_s - self.start_s - self.stall_s)


def simulate(work: Workload, cache_bytes: int, source: Source, pace: Pace, *, foresight: bool = True) -> Forecast:
    """How the steps of ``work`` go with a cache that is empty at first. Without ``foresight`` the same shards are kept, but one
    is fetched only when the loader asks for it."""
    room = work.divide(cache_bytes)
    schedule = Schedule(work.needs, work.num_bytes, capacity=room.planned, start=0, stop=work.stop, present={})
    feed: _Feed = _OnDemand(schedule)
    if foresight:
        feed = Prefetch(schedule, work.num_bytes, windows=work.windows, room=room.unpinned, present={}, start=0)
    pinned = int(work.num_bytes[list(work.pinned)].sum())
    line = _Line(source, work.num_bytes, first_s=source.seconds(pinned, len(work.pinned)))
    start_s, stall_s = _drive(feed, line, work.stop, pace)
    counts = schedule.counts
    return Forecast(
        steps=work.stop,
        visits=counts.visits,
        hits=counts.hits,
        misses=counts.misses,
        refetches=counts.refetches,
        evictions=counts.evictions,
        fetches=line.files + len(work.pinned),
        through=line.through,
        fetched_bytes=line.num_bytes + pinned,
        start_s=start_s,
        stall_s=stall_s,
        source_s=source.seconds(line.num_bytes + pinned, line.files + len(work.pinned)),
        total_s=start_s + stall_s + work.stop * pace.step_s,
    )


def least_cache(work: Workload, source: Source, pace: Pace, *, low: int, high: int, stall_share: float) -> int | None:
    """About the least cache between ``low`` and ``high`` bytes with which the run waits no more than ``stall_share`` of its
    time; None where ``high`` is not enough."""

    def is_enough(cache_bytes: int) -> bool:
        return simulate(work, cache_bytes, source, pace).stall_share <= stall_share

    if not is_enough(high):
        return None
    for _ in range(_TRIALS):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


class _Listed:
    """Needs from step 0 on as a list of visits."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self._visits = visits
        steps: defaultdict[int, list[Int64]] = defaultdict(list)
        for visit in visits:
            steps[visit.shard].append(visit.steps)
        self._steps = {shard: np.concatenate(own) for shard, own in steps.items()}

    def visits(self, start: int, stop: int) -> Iterator[Visit]:
        assert start == 0, "a simulation begins with the run"
        return iter(self._visits)

    def next_step(self, shard: int, after: int, stop: int) -> int | None:
        steps = self._steps[shard]
        later = steps[int(np.searchsorted(steps, after, "right")) :]
        return int(later[0]) if len(later) and later[0] < stop else None

    latest_step = next_step


class _Feed(Protocol):
    """What gives fetches to a line and is told when they are over."""

    def is_ready(self, step: int) -> bool: ...
    def begin(self, *, parallel: int) -> list[Fetch]: ...
    def arrived(self, fetch: Fetch) -> None: ...
    def advance(self, frontier: int) -> None: ...


class _OnDemand:
    """Fetches what a step needs when that step is asked for."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._due: list[Fetch] = []
        self._running = 0

    def is_ready(self, step: int) -> bool:
        while (fetch := self._schedule.next_before(step + 1)) is not None:
            self._due.append(fetch)
        return not self._due and not self._running

    def begin(self, *, parallel: int) -> list[Fetch]:
        free = parallel - self._running
        begun, self._due = self._due[:free], self._due[free:]
        self._running += len(begun)
        return begun

    def arrived(self, fetch: Fetch) -> None:
        self._running -= 1

    def advance(self, frontier: int) -> None:
        """Nothing waits for room: what a step needs is asked for when all before it has been read."""


@dataclass(kw_only=True)
class _File:
    fetch: Fetch
    begins_s: float
    left: float


class _Line:
    """The files under way from a source, on a clock of its own; those that have begun share its bandwidth evenly."""

    def __init__(self, source: Source, num_bytes: Int64, *, first_s: float) -> None:
        self.now_s = 0.0
        self.num_bytes = self.files = self.through = 0
        self.parallel = source.parallel
        self._source = source
        self._sizes = num_bytes
        self._first_s = first_s
        self._open: list[_File] = []

    @property
    def is_idle(self) -> bool:
        return not self._open

    def start(self, fetch: Fetch) -> None:
        size = int(self._sizes[fetch.shard])
        self.num_bytes += size
        self.files += 1
        self.through += fetch.through
        begins_s = max(self.now_s, self._first_s) + self._source.latency_s
        self._open.append(_File(fetch=fetch, begins_s=begins_s, left=float(size)))

    def advance(self, until_s: float) -> Fetch | None:
        """Let time pass until a file is whole, which is given, or until ``until_s``."""
        while True:
            flowing = [file for file in self._open if file.begins_s <= self.now_s]
            events = [file.begins_s for file in self._open if file.begins_s > self.now_s]
            rate = self._source.bytes_per_s / max(len(flowing), 1)
            done = min(flowing, key=lambda file: file.left, default=None)
            done_s = self.now_s + done.left / rate if done else float("inf")
            at_s = min([until_s, done_s, *events])
            for file in flowing:
                file.left -= (at_s - self.now_s) * rate
            self.now_s = max(self.now_s, at_s)
            if done is not None and at_s == done_s:
                self._open.remove(done)
                return done.fetch
            if at_s == until_s:
                return None


def _drive(feed: _Feed, line: _Line, stop: int, pace: Pace) -> tuple[float, float]:
    """Seconds that the training waits for its first step, and for all others together, with a loader that takes a step as soon
    as it is ready and there is room for one more ahead of the training."""
    begins: list[float] = []  # when the training takes each step
    waited_s = 0.0
    for step in range(stop):
        free_s = begins[-1] + pace.step_s if begins else 0.0
        asks_s = free_s if not pace.ahead_steps else begins[step - pace.ahead_steps] if step >= pace.ahead_steps else 0.0
        _pass(feed, line, asks_s)
        while not feed.is_ready(step):
            _start(feed, line)
            assert not line.is_idle, "a step that is not ready waits for a fetch"
            fetch = line.advance(float("inf"))
            assert fetch is not None
            feed.arrived(fetch)
        feed.advance(step + 1)
        _start(feed, line)
        begins.append(max(free_s, line.now_s))
        waited_s += begins[-1] - free_s
    return begins[0], waited_s - begins[0]


def _pass(feed: _Feed, line: _Line, until_s: float) -> None:
    """Let time pass, with fetches beginning as others end."""
    _start(feed, line)
    while until_s > line.now_s and (fetch := line.advance(until_s)) is not None:
        feed.arrived(fetch)
        _start(feed, line)


def _start(feed: _Feed, line: _Line) -> None:
    for fetch in feed.begin(parallel=line.parallel):
        line.start(fetch)
