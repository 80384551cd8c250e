"""A run in stages that is killed in the middle of one goes on, on another number of ranks, with the very next row."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from token_stores import documents, make_dataset
from training_jobs import curve, job, noted_rows, records

from outgrow.cluster.local import run_local
from outgrow.contracts import StepRecord
from outgrow.errors import TrainingError

TRAIN = "training_jobs:train_and_note_rows"
STEPS = 20
STAGES = [
    {"tokens": 5 * 7 * 32, "shares": {"a": 0.8, "b": 0.2}},
    {"tokens": 11 * 7 * 64, "shares": {"a": 0.3, "b": 0.7}, "sequence_length": 64},
    {"shares": {"a": 1}},
]


def slow(seconds: float) -> dict[str, Any]:
    """A constant learning rate that takes its time, so that there is some to kill a run half-way; float64 tells rounding from
    other rows."""
    schedule = {"kind": "custom", "factory": "slow_schedule:constant", "options": {"seconds": seconds}}
    return {"schedule": schedule, "precision": "fp64"}


def kill_the_ranks(record: StepRecord) -> None:
    """As a power cut does, once the checkpoint of step 8, in the second stage, is there."""
    if record.kind == "checkpoint" and record.detail["step"] >= 8:
        for child in psutil.Process().children():
            if "outgrow.cluster.local" in " ".join(child.cmdline()):
                os.killpg(child.pid, signal.SIGKILL)


def test_killed_in_the_second_stage_on_two_ranks_and_gone_on_with_one(tmp_path: Path) -> None:
    streams = {
        "a": (documents(1, 121, weighted=True), documents(2, 7)),
        "b": (documents(3, 45), documents(4, 5)),
    }
    dataset = make_dataset(tmp_path, streams, data={"stages": STAGES})
    run_local(job(dataset, "straight", STEPS, **slow(0)), TRAIN, on_record=lambda record: None)
    with pytest.raises(TrainingError, match="was killed by SIGKILL"):
        run_local(job(dataset, "killed", STEPS, workers=2, **slow(0.2)), TRAIN, on_record=kill_the_ranks)
    run_local(job(dataset, "killed", STEPS, **slow(0)), TRAIN, on_record=lambda record: None)

    expected = noted_rows(dataset, "straight", 1)
    assert [length for length, _ in expected.values()] == [32] * 5 + [64] * 11 + [32] * 4
    before, after = noted_rows(dataset, "killed", 2), noted_rows(dataset, "killed", 1)
    first = next(iter(after))
    assert [record.step for record in records(dataset, "killed", "start")] == [0, first]
    assert 8 <= first < 16, "killed and resumed within the second stage"
    assert {**before, **after} == expected
    assert list(after) == list(range(first, STEPS))
    for step, (loss, norm) in curve(dataset, "straight").items():
        assert curve(dataset, "killed")[step] == pytest.approx((loss, norm), rel=0, abs=1e-9)
