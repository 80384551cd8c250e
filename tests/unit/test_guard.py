"""The guard decides by values alone; what it has counted survives in a checkpoint; what the run went back from is cleared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outgrow.contracts import CheckpointRef
from outgrow.errors import IntegrityError, RunError
from outgrow.recipes.schema.training import NoGuard, RollBackOnRise, StopOnRise
from outgrow.storage import Storage
from outgrow.trainers import roll_back
from outgrow.trainers.checkpoint.catalog import Saved
from outgrow.trainers.checkpoint.format import Manifest
from outgrow.trainers.checkpoint.retention import Retention, best_checkpoint, best_of, to_remove
from outgrow.trainers.guard import Action, GuardState, guard_in, judge, taken_over, watched, why_ended
from outgrow.trainers.roll_back import RollBack, belongs, state_after
from outgrow.trainers.validation import ValidationLoss

STOP = StopOnRise(kind="stop", metric="general", rise=0.5)
BACK = RollBackOnRise(kind="roll_back", metric="general", rise=0.5, times=1)
RUN = "runs/tiny"


def told(guard: StopOnRise | RollBackOnRise, losses: list[float | None]) -> list[Action]:
    """What the guard says after each of ``losses``, validated every 10 steps from step 0 on."""
    state, said = GuardState(), []
    for number, loss in enumerate(losses):
        state, action = judge(guard, state, 10 * number, loss)
        said.append(action)
    return said


@pytest.mark.parametrize(
    ("changes", "losses", "expected"),
    [
        ({}, [3.0, 2.0, 2.4, 2.5], "gggs"),
        ({}, [3.0, 3.5], "gs"),
        ({}, [3.0, 3.49, 3.2], "ggg"),
        ({}, [3.0, None, 3.6], "ggs"),
        ({"patience": 2}, [3.0, 3.6, 3.1, 3.6, 3.7], "ggggs"),
        ({"patience": 2}, [3.0, 3.6, None, 3.6], "gggs"),
        ({"patience": 2}, [3.0, 3.6, 2.9, 3.5], "gggg"),
    ],
)
def test_a_rise_is_measured_from_the_lowest_so_far(changes: dict[str, Any], losses: list[float | None], expected: str) -> None:
    assert [action[0] for action in told(STOP.model_copy(update=changes), losses)] == list(expected)


def test_it_goes_back_so_often_and_then_ends() -> None:
    state, action = judge(BACK, GuardState(lowest=2.0, lowest_step=10, rate=0.25), 20, 2.7)
    assert (action, state.ended, state.rises) == ("roll_back", False, 1)
    back = RollBack.wanted(state, 20, BACK.factor, "so")
    assert (back.number, back.rate) == (1, 0.125)
    assert back.state == GuardState(lowest=2.0, lowest_step=10, roll_backs=1, rate=0.125)
    assert judge(BACK, back.state, 20, 2.4) == (back.state, "go_on")
    state, action = judge(BACK, back.state, 20, 2.5)
    assert (action, state.ended) == ("stop", True)


def test_nothing_is_judged_without_a_guard_or_a_measurement() -> None:
    found = ValidationLoss(total=None, streams={"general": 2.0})
    assert judge(NoGuard(), GuardState(), 10, 9.0) == (GuardState(), "go_on")
    assert watched(NoGuard(), found) is None and watched(STOP, None) is None
    assert watched(STOP, found) == 2.0 and watched(STOP.model_copy(update={"metric": "total"}), found) is None


@pytest.mark.parametrize(
    "state",
    [
        GuardState(),
        GuardState(lowest=0.0),
        GuardState(lowest=2.5, lowest_step=30, rises=1, roll_backs=2, rate=0.25, ended=True),
        GuardState(roll_backs=1, rate=0.5),
    ],
)
def test_a_checkpoint_keeps_the_state(state: GuardState) -> None:
    manifest = Manifest(step=1, world=1, attempt="a", saved=0.0, metrics=state.metrics(), chunk_bytes=1, files={})
    assert GuardState.of(Manifest.model_validate_json(manifest.to_bytes()).metrics) == state
    assert bool(state.metrics()) == (state != GuardState()), "a run without a guard keeps nothing of one"


def test_another_guard_decides_anew() -> None:
    state = GuardState(lowest=2.0, lowest_step=10, rises=1, roll_backs=1, rate=0.5, ended=True)
    assert taken_over(state, STOP, STOP) == state
    higher = taken_over(state, STOP, STOP.model_copy(update={"rise": 0.9}))
    assert higher == GuardState(lowest=2.0, lowest_step=10, roll_backs=1, rate=0.5)
    of_another = GuardState(roll_backs=1, rate=0.5)
    assert taken_over(state, STOP, STOP.model_copy(update={"metric": "total"})) == of_another
    assert taken_over(state, STOP, NoGuard()) == taken_over(state, NoGuard(), STOP) == of_another


def test_the_guard_of_a_checkpoint_is_read_from_its_recipe() -> None:
    assert guard_in({"validation": {"on_rise": STOP.model_dump()}}) == STOP
    assert guard_in({}) == guard_in({"validation": {}}) == guard_in({"validation": {"on_rise": {"kind": "new"}}}) == NoGuard()


def test_why_it_ended_is_known_as_long_as_the_guard_is_the_same() -> None:
    state = GuardState(lowest=2.0, lowest_step=10, rises=1, ended=True)
    metrics = state.metrics() | {"validation_loss/general": 2.75}
    recipe = {"validation": {"on_rise": STOP.model_dump()}}
    assert why_ended(metrics, 30, recipe, STOP) == (
        "the validation loss of 'general' has risen to 2.7500 at step 30, 0.7500 above its lowest, 2.0000 at step 10; "
        "validation.on_rise allows less than 0.5"
    )
    assert why_ended(metrics, 30, recipe, STOP.model_copy(update={"rise": 0.6})) == ""
    assert why_ended(metrics | {"guard/ended": 0.0}, 30, recipe, STOP) == ""
    back = {"validation": {"on_rise": BACK.model_dump()}}
    assert why_ended(metrics, 30, back, BACK).endswith("and there is no checkpoint to go back to")


# --- which checkpoints are the run's ----------------------------------------------------------------------------------


def saved(step: int, *, backs: int = 0, **losses: float) -> Saved:
    metrics = {"guard/roll_backs": float(backs)} | {f"validation_loss/{name}": loss for name, loss in losses.items()}
    manifest = Manifest(step=step, world=1, attempt="a", saved=0.0, metrics=metrics, chunk_bytes=1, files={})
    return Saved(CheckpointRef(folder=f"f{step}", step=step, digest="", bytes=0), manifest)


def back(number: int, to_step: int) -> RollBack:
    given: dict[str, Any] = {"from_step": 90, "rate": 0.5**number, "lowest": 2.0, "lowest_step": 0, "why": "so", "time": 0.0}
    return RollBack(number=number, to_step=to_step, **given)


@pytest.mark.parametrize(
    ("checkpoint", "to_steps", "is_its"),
    [
        (saved(30), [], True),
        (saved(20), [20], True),
        (saved(30), [20], False),
        (saved(30, backs=1), [20], True),
        (saved(20), [20, 10], False),
        (saved(20), [10, 20], False),
        (saved(15, backs=1), [10, 20], True),
        (saved(30, backs=2), [10, 20], True),
    ],
)
def test_a_checkpoint_belongs_to_the_run_unless_the_run_went_back_from_it(
    checkpoint: Saved, to_steps: list[int], is_its: bool
) -> None:
    backs = [back(number, to_step) for number, to_step in enumerate(to_steps, 1)]
    assert belongs(checkpoint, backs) == is_its


def test_the_state_is_that_of_the_last_time_the_run_went_back() -> None:
    backs = [back(1, 20), back(2, 10)]
    assert state_after(GuardState(rises=3), []) == GuardState(rises=3)
    assert state_after(GuardState(rises=3, roll_backs=1), backs) == backs[1].state
    assert state_after(GuardState(rises=3, roll_backs=2), backs).rises == 3


def test_a_torn_file_of_a_roll_back_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert roll_back.settle(storage, RUN, 0) == ()
    storage.write_json(f"{RUN}/roll-backs/001.json", back(1, 20).to_dict())
    assert roll_back.settle(storage, RUN, 0) == (back(1, 20),)
    storage.write(f"{RUN}/roll-backs/002.json", b'{"number": 2')
    with pytest.raises(IntegrityError, match=r"this is no RollBack.*put it back|roll-backs/002\.json"):
        roll_back.settle(storage, RUN, 0)


def test_the_best_is_that_of_the_metric_asked_for(tmp_path: Path) -> None:
    found = [saved(30, general=2.0, narrow=1.0), saved(20, general=1.5, narrow=2.0), saved(10, general=1.5), saved(5)]
    assert (best := best_of(found, "general")) and best.ref.step == 20
    assert (best := best_of(found, "narrow")) and best.ref.step == 30
    assert best_of(found, "total") is None
    assert [s.ref.step for s in to_remove(found, 30, Retention(1, 1, "general"), [])] == [10, 5]
    with pytest.raises(RunError, match="no checkpoint was made at a validation that measured general"):
        best_checkpoint(Storage(str(tmp_path)), RUN, "general")
