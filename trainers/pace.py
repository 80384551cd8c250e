"""How long steps take and what their time goes to: the one stopwatch of the loop.

A step lasts from the end of the step before to its own; validation and the copy of a checkpoint lie between steps. Its phases
lie one after another in it; what is left is the loop's own work. The first step begins when its rows are there: until then
loader workers start, which is no part of any step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple

from outgrow.contracts import StepRows
from outgrow.monitoring.recording.slots import Phase
from outgrow.trainers.clock import Clock, Moment


class StepTimes(NamedTuple):
    """Seconds of one step by phase, and in all. ``data_wait`` is how long the loader had no rows while nothing was computed."""

    phases: dict[Phase, float]
    step_s: float


@dataclass(frozen=True)
class Speed:
    """Averages over the steps since the last look; seconds a step, and of these the seconds spent waiting for data.

    None where the times of none of them are known yet.
    """

    step_s: float | None
    data_wait_s: float | None
    tokens_per_s: float | None


class Pace(Generic[Moment]):
    """A stopwatch around the steps of one process, by the given clock; it never waits for a device."""

    def __init__(self, clock: Clock[Moment]) -> None:
        self._clock = clock
        self._now = clock.now
        self._last = clock.now()
        """When the step before ended, or what came between steps."""
        self._marks: list[tuple[Phase, Moment]] = []
        self._waited_s = 0.0
        self._unread: deque[tuple[Moment, float, list[tuple[Phase, Moment]], int, Moment]] = deque()
        """Of each step that is not read: when it began, how long the loader had no rows, its marks, its tokens, its end."""
        self._tokens = 0
        self._begin_stretch()

    def steps(self, loader: Iterable[StepRows]) -> Iterator[StepRows]:
        """What the loader yields; a step begins with the wait for it."""
        rows = iter(loader)
        first = True
        while True:
            asked = time.perf_counter()
            try:
                step = next(rows)
            except StopIteration:
                return
            self._waited_s = time.perf_counter() - asked
            if first:
                self._last, self._waited_s, first = self._now(), 0.0, False
            self._marks, self._tokens = [], step.tokens
            yield step

    def mark(self, phase: Phase) -> None:
        """What is computed from here on, until the next mark, is of ``phase``."""
        self._marks.append((phase, self._now()))

    def finish_step(self) -> None:
        """The step ends here."""
        start, self._last = self._last, self._now()
        self._unread.append((start, self._waited_s, self._marks, self._tokens, self._last))

    def known(self) -> list[StepTimes]:
        """The times that have become known since this was asked last, in order."""
        found: list[StepTimes] = []
        while self._unread and self._clock.is_reached(self._unread[0][-1]):
            found.append(self._read(*self._unread.popleft()))
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what runs within, between two steps, out of the steps' time."""
        yield
        self._last = self._clock.now()

    def look(self) -> Speed:
        """The averages over the steps that have become known since the last look; a new stretch begins."""
        steps, seconds = self._read_steps, self._read_s
        if not steps:
            return Speed(None, None, None)
        speed = Speed(seconds / steps, self._read_waited_s / steps, self._read_tokens / seconds)
        self._begin_stretch()
        return speed

    def _read(self, start: Moment, waited_s: float, marks: list[tuple[Phase, Moment]], tokens: int, end: Moment) -> StepTimes:
        seconds = self._clock.seconds
        phases: dict[Phase, float] = {}
        after = end
        for phase, begin in reversed(marks):
            phases[phase] = phases.get(phase, 0.0) + seconds(begin, after)
            after = begin
        # A device may still have had work when the loop began to wait, and may have stood still for another reason than that.
        phases["data_wait"] = min(waited_s, seconds(start, after))
        step_s = seconds(start, end)
        self._clock.give_back(start, marks)
        self._read_steps += 1
        self._read_tokens += tokens
        self._read_s += step_s
        self._read_waited_s += phases["data_wait"]
        return StepTimes(phases, step_s)

    def _begin_stretch(self) -> None:
        self._read_steps = 0
        self._read_tokens = 0
        self._read_s = 0.0
        self._read_waited_s = 0.0
