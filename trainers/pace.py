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
from dataclasses import dataclass, field
from typing import Generic

from outgrow.contracts import StepRows
from outgrow.monitoring.recording.slots import Phase
from outgrow.trainers.clock import Clock, Moment


@dataclass(frozen=True)
class StepTimes:
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


@dataclass
class _Step(Generic[Moment]):
    """A step that is open, or finished and not read. ``marks`` are the phases and when they began, ``start`` is when the step
    before had ended."""

    start: Moment
    waited_s: float
    tokens: int
    marks: list[tuple[Phase, Moment]] = field(default_factory=list)


class Pace(Generic[Moment]):
    """A stopwatch around the steps of one process, by the given clock; it never waits for a device."""

    def __init__(self, clock: Clock[Moment]) -> None:
        self._clock = clock
        self._last = clock.now()
        """When the step before ended, or what came between steps."""
        self._open = _Step(self._last, 0.0, 0)
        self._unread: deque[tuple[_Step[Moment], Moment]] = deque()
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
            waited_s = time.perf_counter() - asked
            if first:
                self._last, waited_s, first = self._clock.now(), 0.0, False
            self._open = _Step(self._last, waited_s, step.tokens)
            yield step

    def mark(self, phase: Phase) -> None:
        """What is computed from here on, until the next mark, is of ``phase``."""
        self._open.marks.append((phase, self._clock.now()))

    def finish_step(self) -> None:
        """The step ends here."""
        self._last = self._clock.now()
        self._unread.append((self._open, self._last))

    def known(self) -> list[StepTimes]:
        """The times that have become known since this was asked last, in order."""
        found: list[StepTimes] = []
        while self._unread and self._clock.is_reached(self._unread[0][1]):
            step, end = self._unread.popleft()
            found.append(self._read(step, end))
            self._clock.give_back([step.start, *(moment for _, moment in step.marks)])
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what runs within, between two steps, out of the steps' time."""
        yield
        self._last = self._clock.now()

    def look(self) -> Speed:
        """The averages over the steps that have become known since the last look; a new stretch begins."""
        if not self._steps:
            return Speed(None, None, None)
        speed = Speed(self._seconds / self._steps, self._waited_s / self._steps, self._tokens / self._seconds)
        self._begin_stretch()
        return speed

    def _read(self, step: _Step[Moment], end: Moment) -> StepTimes:
        between = self._clock.seconds
        ends = [*(moment for _, moment in step.marks[1:]), end]
        # A device may still have had work when the loop began to wait, and may have stood still for another reason than that.
        phases: dict[Phase, float] = {"data_wait": min(step.waited_s, between(step.start, step.marks[0][1]))}
        for (phase, start), after in zip(step.marks, ends, strict=True):
            phases[phase] = phases.get(phase, 0.0) + between(start, after)
        step_s = between(step.start, end)
        self._steps += 1
        self._tokens += step.tokens
        self._seconds += step_s
        self._waited_s += phases["data_wait"]
        return StepTimes(phases, step_s)

    def _begin_stretch(self) -> None:
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._waited_s = 0.0
