"""Moments of the training loop, taken on the host or in the device's own queue, without ever waiting for the device.

On a CPU a moment is what the clock says. A device computes behind the loop's back: there a moment is an event that the device
passes when it comes to it, which is known some steps later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

Moment = TypeVar("Moment")


class Clock(Protocol[Moment]):
    """Where moments come from. They are reached in the order in which they were taken."""

    def now(self) -> Moment: ...

    def is_reached(self, moment: Moment) -> bool:
        """Whether ``moment`` has come; never waits for it."""

    def seconds(self, start: Moment, end: Moment) -> float:
        """Between two moments that are reached."""

    def give_back(self, start: Moment, marks: Sequence[tuple[object, Moment]]) -> None:
        """These moments of a step are asked for no more."""


class HostClock:
    """The process's own clock, for what is computed when the call returns."""

    now = staticmethod(time.perf_counter)

    def is_reached(self, moment: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def give_back(self, start: float, marks: Sequence[tuple[object, float]]) -> None:
        """A number needs no care."""


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceClock:
    """Events in the current stream of the current CUDA device. A pool of them goes round, so that a step makes none."""

    def __init__(self, make: Callable[[], torch.cuda.Event] = timing_event) -> None:
        self._make = make
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else self._make()
        event.record()
        return event

    def is_reached(self, moment: torch.cuda.Event) -> bool:
        return bool(moment.query())  # type: ignore[no-untyped-call]

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1000

    def give_back(self, start: torch.cuda.Event, marks: Sequence[tuple[object, torch.cuda.Event]]) -> None:
        self._free.append(start)
        self._free.extend(event for _, event in marks)


def clock_for(device: torch.device) -> HostClock | DeviceClock:
    """The clock of what computes on ``device``."""
    return DeviceClock() if device.type == "cuda" else HostClock()
