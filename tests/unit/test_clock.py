"""The stopwatch on a device that computes behind the host's back: the real code on events of a made-up device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from outgrow.contracts import StepRows
from outgrow.monitoring.recording.slots import Phase
from outgrow.trainers import pace as pace_module
from outgrow.trainers.clock import DeviceClock, HostClock, clock_for
from outgrow.trainers.pace import Pace, StepTimes


@dataclass
class Device:
    """One host that hands out work and goes on, and one device that does it in order. Times are seconds since the beginning."""

    host: float = 0.0
    busy_until: float = 0.0
    events: int = 0

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.host) + seconds

    def synchronise(self) -> None:
        self.host = max(self.host, self.busy_until)

    def perf_counter(self) -> float:
        return self.host

    def make_event(self) -> Any:
        self.events += 1
        return Event(self)


@dataclass
class Event:
    """As ``torch.cuda.Event``: passed when the device comes to it. Whoever waits for it, or asks too early, is caught."""

    device: Device
    at: float | None = None

    def record(self) -> None:
        self.at = max(self.device.busy_until, self.device.host)

    def query(self) -> bool:
        assert self.at is not None
        return self.device.host >= self.at

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "torch raises for an event that has not come"
        return 1000 * (cast(float, end.at) - cast(float, self.at))

    def synchronize(self) -> None:
        raise AssertionError("the loop waits for the device")


@dataclass
class Twin:
    """When the device came to each place of each step, noted as it was launched, and read at the very end."""

    steps: list[tuple[float, float, list[tuple[Phase, float]], float]] = field(default_factory=list)

    def times(self) -> list[StepTimes]:
        found = []
        for start, waited, marks, end in self.steps:
            phases: dict[Phase, float] = {"data_wait": min(waited, marks[0][1] - start)}
            for place, (phase, at) in enumerate(marks):
                after = marks[place + 1][1] if place + 1 < len(marks) else end
                phases[phase] = phases.get(phase, 0.0) + after - at
            found.append(StepTimes(phases, end - start))
        return found


def rows(step: int) -> StepRows:
    return StepRows(step=step, epoch=0, row_ids=(), global_weight=1.0, tokens=10, micro_batches=())


@pytest.mark.parametrize("seed", range(8))
def test_a_device_tells_what_the_twin_noted_and_nobody_waits_for_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, device, twin = random.Random(seed), Device(), Twin()
    monkeypatch.setattr(pace_module, "time", device)
    clock = DeviceClock(device.make_event)
    pace = Pace(clock)
    told: list[StepTimes] = []
    waited = 0.0

    def loader() -> Iterator[StepRows]:
        nonlocal waited
        for step in range(60):
            waited = draw.choice([0.0, 0.0, 3.0]) * draw.random()
            device.host += waited
            yield rows(step)

    start: float | None = None
    for number, _ in enumerate(pace.steps(loader())):
        if start is None:
            start, waited = max(device.host, device.busy_until), 0.0
        marks: list[tuple[Phase, float]] = []
        for phase in ("forward", "backward", "forward", "backward", "collectives", "optimizer"):
            device.host += 0.01 * draw.random()
            marks.append((cast(Phase, phase), max(device.host, device.busy_until)))
            pace.mark(cast(Phase, phase))
            device.launch(draw.random())
        pace.finish_step()
        end = max(device.host, device.busy_until)
        twin.steps.append((start, waited, marks, end))
        start = end
        told += pace.known()
        if draw.random() < 0.2:  # a loss is read
            device.synchronise()
            told += pace.known()
            assert len(told) == number + 1, "all that was launched is known"
            device.host += 0.1
            if draw.random() < 0.5:
                with pace.paused():
                    device.host += 5.0
                    device.launch(1.0)
                    device.synchronise()
                start = device.host
    device.synchronise()
    told += pace.known()
    expected = twin.times()
    assert len(told) == len(expected)
    for one, other in zip(told, expected, strict=True):
        assert one.step_s == pytest.approx(other.step_s, abs=1e-9)
        assert one.phases == pytest.approx(other.phases, abs=1e-9)
    assert device.events < 60 * 7, "events go round"


def test_a_loader_that_is_slow_while_the_device_is_busy_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(pace_module, "time", device)
    pace = Pace(DeviceClock(device.make_event))

    def loader() -> Iterator[StepRows]:
        yield rows(0)
        device.host += 9.0  # the device is busy for 10
        yield rows(1)
        device.host += 12.0  # it has work for 11 of them
        yield rows(2)

    for _ in pace.steps(loader()):
        pace.mark("forward")
        device.launch(10.0)
        pace.finish_step()
    device.synchronise()
    waits = [times.phases["data_wait"] for times in pace.known()]
    assert waits == pytest.approx([0.0, 0.0, 1.0])
    assert pace.look().tokens_per_s == pytest.approx(30 / 31)


def test_a_device_that_stands_still_for_the_loops_own_work_does_not_wait_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(pace_module, "time", device)
    pace = Pace(DeviceClock(device.make_event))
    for _ in pace.steps(iter([rows(0), rows(1)])):
        pace.mark("forward")
        device.launch(1.0)
        pace.finish_step()
        device.synchronise()
        device.host += 0.5  # it writes something down
    last = pace.known()[-1]
    assert (last.phases["data_wait"], last.step_s) == pytest.approx((0.0, 1.5))


def test_the_clock_is_that_of_the_device() -> None:
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    assert isinstance(clock_for(torch.device("cuda", 1)), DeviceClock)
