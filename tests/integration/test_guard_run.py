"""Runs that forget: measured before, during and after, stopped or taken back, killed in the middle of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forgetting import EVERY, STEPS, forgetful, guarded
from token_stores import Dataset
from training_jobs import TRAIN_WORKER, curve, records

from outgrow.cli.model import _best_step
from outgrow.cluster.local import run_local
from outgrow.cluster.runs import RunFile, StoredRun
from outgrow.contracts import JobSpec, WorkerResult
from outgrow.errors import PlanError, RunError
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers import loop, roll_back
from outgrow.trainers.checkpoint.catalog import list_checkpoints

STOP = {"kind": "stop", "metric": "general", "rise": 0.5}
BACK = {"kind": "roll_back", "metric": "general", "rise": 0.5, "factor": 0.25, "times": 1}


class Killed(BaseException):
    """Ends a run at a chosen point as a kill does: nothing of outgrow catches it."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return forgetful(tmp_path_factory.mktemp("dataset"))


def run(spec: JobSpec) -> WorkerResult:
    return run_local(spec, TRAIN_WORKER, on_record=lambda record: None).worker


def general(dataset: Dataset, name: str) -> dict[int, float]:
    """Loss on the general set by step; of a step that was validated twice, the later."""
    return {record.step: record.detail["streams"]["general"] for record in records(dataset, name, "validation")}


def saved_steps(dataset: Dataset, name: str) -> list[int]:
    return [ref.step for ref in list_checkpoints(Storage(str(dataset.root)), f"runs/{name}")]


def timeless(result: WorkerResult, name: str) -> WorkerResult:
    """A result without what differs from run to run."""
    text = json.dumps(result.to_dict()).replace(f"runs/{name}/", "runs/")
    return dataclasses.replace(WorkerResult.from_dict(json.loads(text)), seconds=0.0)


@pytest.fixture(scope="module")
def unguarded(dataset: Dataset) -> WorkerResult:
    return run(guarded(dataset, "unguarded", None))


@pytest.fixture(scope="module")
def taken_back(dataset: Dataset) -> WorkerResult:
    return run(guarded(dataset, "taken-back", BACK))


def test_a_general_set_is_measured_before_during_and_after_and_is_no_part_of_the_total(
    dataset: Dataset, unguarded: WorkerResult
) -> None:
    measured = records(dataset, "unguarded", "validation")
    assert [record.step for record in measured] == list(range(0, STEPS + 1, EVERY))
    assert all(record.loss == record.detail["streams"]["narrow"] for record in measured)
    losses = general(dataset, "unguarded")
    assert min(losses, key=losses.__getitem__) == 8 and losses[0] > losses[8] < losses[12] < losses[16] < losses[STEPS]
    assert unguarded.best is not None and unguarded.best.step == 8 and unguarded.best.loss == losses[8]
    newest, before, best = saved_steps(dataset, "unguarded")
    # A save that was due while the one before was still written is some steps late.
    assert newest == 24 and 20 <= before < 24 and best == 8, "two newest, and the best by the general set"
    assert records(dataset, "unguarded", "end")[0].detail["best"] == unguarded.best.to_dict()


def test_the_best_checkpoint_is_what_export_takes_when_asked(dataset: Dataset, unguarded: WorkerResult) -> None:
    spec = guarded(dataset, "unguarded", None)
    file = RunFile(name="unguarded", fingerprint="f", created="2026-01-01", recipe=spec.recipe)
    stored, site = StoredRun(ref=spec.run, file=file), Site.model_validate(spec.site)
    assert _best_step(site, stored, None) == 8
    with pytest.raises(RunError, match=r"--best was given beside --step 4; allowed: one of the two"):
        _best_step(site, stored, 4)


def test_a_resumed_run_is_not_measured_before_its_first_step_again(dataset: Dataset, unguarded: WorkerResult) -> None:
    run(guarded(dataset, "resumed", None, duration={"steps": 8}))
    run(guarded(dataset, "resumed", None))
    assert [record.step for record in records(dataset, "resumed", "validation")] == list(range(0, STEPS + 1, EVERY))
    assert curve(dataset, "resumed") == curve(dataset, "unguarded")


def test_a_rise_ends_the_run_and_another_guard_goes_on_with_it(dataset: Dataset, unguarded: WorkerResult) -> None:
    ended = run(guarded(dataset, "stopped", STOP))
    losses = general(dataset, "unguarded")
    assert ended.step == 16 and saved_steps(dataset, "stopped")[0] == 16
    assert ended.ended == (
        f"the validation loss of 'general' has risen to {losses[16]:.4f} at step 16, {losses[16] - losses[8]:.4f} above its "
        f"lowest, {losses[8]:.4f} at step 8; validation.on_rise allows less than 0.5"
    )
    assert ended.best is not None and ended.best.step == 8
    assert records(dataset, "stopped", "end")[-1].detail["ended"] == ended.ended

    again = run(guarded(dataset, "stopped", STOP, duration={"steps": 2 * STEPS}))
    assert dataclasses.replace(again, seconds=0.0) == dataclasses.replace(ended, seconds=0.0)
    assert len(records(dataset, "stopped", "step")) == 16

    later = run(guarded(dataset, "stopped", STOP | {"rise": 1.2}))
    assert (later.step, "above its lowest" in later.ended) == (20, True), "measured from the lowest before"
    assert run(guarded(dataset, "stopped", None)).ended == ""
    assert curve(dataset, "stopped") == curve(dataset, "unguarded")


def test_patience_asks_for_validations_in_a_row(dataset: Dataset) -> None:
    ended = run(guarded(dataset, "patient", STOP | {"rise": 0.1, "patience": 2}))
    assert ended.step == 16 and ended.ended.endswith("allows less than 0.1 in 2 validations in a row")


def test_a_run_goes_back_to_its_best_checkpoint_and_on_from_there_at_a_lower_rate(
    dataset: Dataset, unguarded: WorkerResult, taken_back: WorkerResult
) -> None:
    """As a run whose schedule falls at that step would: the same rows, bit for bit."""
    (back,) = records(dataset, "taken-back", "roll_back")
    assert (back.step, back.detail["from_step"], back.detail["rate"]) == (8, 16, 0.25)
    steps = [record.step for record in records(dataset, "taken-back", "step")]
    assert steps[:20] == [*range(1, 17), 9, 10, 11, 12]
    drop = {"kind": "custom", "factory": "forgetting:drops", "options": {"at": 8, "to": 0.25}}
    run(guarded(dataset, "twin", None, schedule=drop, duration={"steps": taken_back.step}))
    assert curve(dataset, "taken-back") == curve(dataset, "twin")
    assert all(curve(dataset, "taken-back")[step] == curve(dataset, "unguarded")[step] for step in range(1, 9))
    rates = {record.step: record.learning_rate for record in records(dataset, "taken-back", "step")}
    assert (rates[8], rates[9]) == (0.01, 0.0025)
    assert general(dataset, "taken-back")[16] < general(dataset, "unguarded")[16]


def test_what_a_killed_start_decided_or_would_have_decided_is_what_the_next_one_does(
    dataset: Dataset, taken_back: WorkerResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before the decision is written down, after it, after what it gives up is gone, and among the steps after that."""

    def dies(*args: Any, **values: Any) -> Any:
        raise Killed

    seen: list[int] = []
    real = loop.learning_rate

    def dies_in_its_sixth_step_from_there(recipe: Any, step: int, steps: int) -> float:
        seen.append(step)
        if len(seen) == 16 + 6:
            raise Killed
        return real(recipe, step, steps)

    points = {
        "before": (roll_back, "best_of", dies),
        "written": (roll_back, "_clear_away", _dies_once_written(roll_back._clear_away)),
        "cleared": (loop, "resume", dies),
        "after": (loop, "learning_rate", dies_in_its_sixth_step_from_there),
    }
    for name, (module, attribute, replaced) in points.items():
        with monkeypatch.context() as patched:
            patched.setattr(module, attribute, replaced)
            with pytest.raises(Killed):
                run(guarded(dataset, name, BACK))
        again = run(guarded(dataset, name, BACK))
        assert timeless(again, name) == timeless(taken_back, "taken-back"), name
        assert curve(dataset, name) == curve(dataset, "taken-back"), name
        assert general(dataset, name) == general(dataset, "taken-back"), name
        assert saved_steps(dataset, name) == saved_steps(dataset, "taken-back"), name


def _dies_once_written(clear_away: Any) -> Any:
    def dies(storage: Storage, run_folder: str) -> Any:
        if roll_back.read(storage, run_folder):
            raise Killed
        return clear_away(storage, run_folder)

    return dies


def test_a_process_that_is_killed_as_it_goes_back_changes_nothing(dataset: Dataset, taken_back: WorkerResult) -> None:
    spec = guarded(dataset, "killed", BACK)
    program = (
        "import json, sys; from outgrow.contracts import JobSpec; from outgrow.cluster.local import run_local; "
        "run_local(JobSpec.from_dict(json.load(sys.stdin)), 'forgetting:dies_before_clearing_away', on_record=lambda r: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(spec.to_dict()),
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=200,
        check=False,
    )
    assert done.returncode == -9 and saved_steps(dataset, "killed")[0] == 12, "of the steps that it goes back from"
    assert timeless(run(spec), "killed") == timeless(taken_back, "taken-back")
    assert curve(dataset, "killed") == curve(dataset, "taken-back")


def test_the_first_weights_are_a_checkpoint_to_go_back_to(dataset: Dataset) -> None:
    """A rate so high that nothing is better than before the first step, until it was lowered twice."""
    ended = run(guarded(dataset, "at-once", BACK | {"rise": 0.01, "times": 2}, rate=1.0))
    backs = records(dataset, "at-once", "roll_back")
    assert [(back.step, back.detail["rate"]) for back in backs] == [(0, 0.25), (0, 0.0625)]
    assert ended.ended.endswith("and the run has gone back 2 time(s) already") and ended.best and ended.best.step == 4


def test_ranks_go_back_together_with_rows_that_are_read_ahead(dataset: Dataset, taken_back: WorkerResult) -> None:
    together = run(guarded(dataset, "together", BACK, workers=2, loader_workers=1))
    assert (together.step, len(records(dataset, "together", "roll_back"))) == (taken_back.step, 1)
    for step, (loss, norm) in curve(dataset, "taken-back").items():
        assert curve(dataset, "together")[step] == pytest.approx((loss, norm), rel=0, abs=1e-4)


def test_a_metric_that_no_document_is_held_out_for_is_refused(dataset: Dataset) -> None:
    card = dataset.card
    streams = tuple(dataclasses.replace(stream, validation_rows=0) for stream in card.streams if stream.name == "narrow")
    index = dataclasses.replace(card.indexes[0], streams=(card.streams[0], *streams))
    spec = dataclasses.replace(
        guarded(dataset, "unmeasured", STOP | {"metric": "narrow"}), card=dataclasses.replace(card, indexes=(index,))
    )
    with pytest.raises(
        PlanError, match=r"validation\.on_rise\.metric is narrow, of which no document is held out; measured: gen"
    ):
        run(spec)
