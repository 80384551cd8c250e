"""How fast a run goes: seconds, waiting for data, and tokens, averaged over the steps between two looks.

A device computes behind the loop's back, so the clock of a single step says little; between two looks, each of which
reads a loss and so waits for the device, the average is right. Validation and the copy of a checkpoint are not part of a
step.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from outgrow.contracts import StepRows


@dataclass(frozen=True)
class Speed:
    """Averages over the steps since the last look; seconds a step, and of these the seconds spent waiting for data."""

    step_s: float
    data_wait_s: float
    tokens_per_s: float


class Pace:
    """A stopwatch around the steps of one process."""

    def __init__(self) -> None:
        self._begin()

    def steps(self, loader: Iterable[StepRows]) -> Iterator[StepRows]:
        """What the loader yields, the time until it does taken as waiting for data.

        But for the first: until then loader workers start, which is no part of any step.
        """
        rows = iter(loader)
        for number in itertools.count():
            start = time.perf_counter()
            try:
                step = next(rows)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - start
            if number == 0:
                self._begin()
            self._steps += 1
            self._tokens += step.tokens
            yield step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what runs within out of the steps' time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start

    def look(self) -> Speed:
        """The averages since the last look, after at least one step; a new stretch begins."""
        seconds = time.perf_counter() - self._since - self._paused_s
        speed = Speed(seconds / self._steps, self._waited_s / self._steps, self._tokens / seconds)
        self._begin()
        return speed

    def _begin(self) -> None:
        self._since = time.perf_counter()
        self._steps = 0
        self._tokens = 0
        self._waited_s = 0.0
        self._paused_s = 0.0
