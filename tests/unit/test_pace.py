"""Speed between two looks, and what is left out of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from outgrow.contracts import StepRows
from outgrow.trainers.clock import HostClock
from outgrow.trainers.finite import FiniteWatch
from outgrow.trainers.pace import Pace


def slow_rows(*waits_s: float) -> Iterator[StepRows]:
    for step, wait_s in enumerate(waits_s):
        time.sleep(wait_s)
        yield StepRows(step=step, epoch=0, row_ids=(), global_weight=1.0, tokens=100, micro_batches=())


def test_waiting_is_measured_and_pauses_and_the_start_are_left_out() -> None:
    pace = Pace(HostClock())
    for _ in pace.steps(slow_rows(0.3, 0.02, 0.02, 0.02)):
        pace.mark("forward")
        time.sleep(0.01)
        pace.finish_step()
        with pace.paused():
            time.sleep(0.1)
    assert len(pace.known()) == 4
    speed = pace.look()
    # Sleeps only ever take longer; counting the start would make the wait 0.09 s, counting pauses the step 0.125 s.
    assert speed.step_s is not None and speed.data_wait_s is not None
    assert 0.06 / 4 <= speed.data_wait_s < 0.08
    assert 0.10 / 4 <= speed.step_s < 0.12
    assert speed.tokens_per_s == pytest.approx(100 / speed.step_s)


def test_each_look_begins_a_new_stretch() -> None:
    pace = Pace(HostClock())
    waits = []
    for number, _ in enumerate(pace.steps(slow_rows(0, 0.05, 0))):
        pace.mark("forward")
        pace.finish_step()
        pace.known()
        if number:
            waits.append(pace.look().data_wait_s or 0.0)
    assert waits[0] > 0.02 > waits[1]
    assert pace.look().step_s is None, "no step since the last look"


def test_phases_follow_each_other_and_leave_out_the_loops_own_work() -> None:
    pace = Pace(HostClock())
    for _ in pace.steps(slow_rows(0, 0.01)):
        time.sleep(0.02)  # the loop's own
        for _ in range(2):
            pace.mark("forward")
            time.sleep(0.01)
            pace.mark("backward")
            time.sleep(0.02)
        pace.mark("optimizer")
        pace.finish_step()
    first, second = pace.known()
    assert set(first.phases) == {"data_wait", "forward", "backward", "optimizer"}
    assert first.phases["data_wait"] < 0.005 < 0.01 <= second.phases["data_wait"]
    for times in (first, second):
        assert times.phases["forward"] >= 0.02 and times.phases["backward"] >= 0.04
        assert 0.02 <= times.step_s - sum(times.phases.values()) < 0.04


def test_the_first_gradient_that_is_not_finite_is_remembered() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    assert watch.first_bad() is None
    for step, norm in enumerate([1.0, float("inf"), float("nan"), 2.0], start=1):
        watch.see(step, torch.tensor(norm))
    assert watch.first_bad() == 2
