"""When a run is saved: put off while the last save is being written, and loud where the last one of all fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from engine_cases import Case, born_engine

from outgrow.errors import TrainingError
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import list_checkpoints
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.saves import Saves

RUN = "runs/r"


class GatedStorage(Storage):
    """A local folder whose data files are written only once ``gate`` is open; ``broken`` makes them fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.gate = threading.Event()
        self.broken = False

    def open_write(self, key: str) -> BinaryIO:
        self.gate.wait(30)
        if self.broken:
            raise OSError(28, "No space left on device")
        return super().open_write(key)


def saves(storage: Storage) -> tuple[Saves, Checkpointer]:
    engine = born_engine(Case(precision="fp32"))
    checkpointer = Checkpointer(storage, Group(RUN, "a", 0, 1), engine.tensors(), Retention(newest=9, best=0))
    return Saves(engine, checkpointer, every_steps=2, device=torch.device("cpu")), checkpointer


def state(step: int) -> StepState:
    return StepState(step=step, loader_state={}, recipe={}, metrics={})


def saved_steps(storage: Storage) -> list[int]:
    return sorted(ref.step for ref in list_checkpoints(storage, RUN))


def test_a_save_that_is_due_while_another_is_written_is_put_off_not_dropped(tmp_path: Path) -> None:
    storage = GatedStorage(tmp_path)
    run, checkpointer = saves(storage)
    assert [step for step in range(1, 7) if run.due(step)] == [2, 4, 6]
    run.save(state(2))
    run.save(state(4))
    assert run.due(5), "step 4's save was put off, so it is due at once"
    storage.gate.set()
    checkpointer.wait()
    run.save(state(5))
    assert not run.due(7)
    run.save_last(state(7))
    assert saved_steps(storage) == [2, 5, 7]
    assert [(result.step, result.error) for result in run.results()] == [(2, ""), (5, ""), (7, "")]
    run.close()


def test_a_run_that_goes_back_owes_no_save(tmp_path: Path) -> None:
    storage = GatedStorage(tmp_path)
    run, _ = saves(storage)
    run.save(state(2))
    run.save(state(4))
    assert run.due(5)
    storage.gate.set()
    run.give_up()
    assert not run.due(3) and saved_steps(storage) == [2]
    run.close()


def test_a_failed_save_is_told_and_the_failed_last_one_raises(tmp_path: Path) -> None:
    storage = GatedStorage(tmp_path)
    storage.gate.set()
    run, checkpointer = saves(storage)
    run.save(state(2))
    checkpointer.wait()
    storage.broken = True
    run.save(state(4))
    checkpointer.wait()
    told = {result.step: result.error for result in run.results()}
    assert told[2] == "" and "No space left on device" in told[4]
    with pytest.raises(TrainingError, match=r"the checkpoint of the last step \(6\) was not committed: .*No space left"):
        run.save_last(state(6))
    assert saved_steps(storage) == [2]
    run.close()
