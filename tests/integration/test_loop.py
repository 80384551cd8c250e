"""``train_worker`` on real data, checkpoints and processes: what it says, where it goes on from, and when it refuses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_stores import Dataset, documents, make_dataset
from training_jobs import CONFIG, TRAIN_WORKER, curve, job, records, two_streams

from outgrow.cluster.local import run_local
from outgrow.contracts import JobSpec, RunResult
from outgrow.errors import RunError, TrainingError
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import list_checkpoints

STEPS = 14


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return two_streams(tmp_path_factory.mktemp("dataset"))


def run(spec: JobSpec) -> RunResult:
    return run_local(spec, TRAIN_WORKER, on_record=lambda record: None)


@pytest.fixture(scope="module")
def straight(dataset: Dataset) -> RunResult:
    """One rank, from the first step to the last."""
    return run(job(dataset, "straight", STEPS))


def saved_steps(dataset: Dataset, name: str) -> list[int]:
    return [ref.step for ref in list_checkpoints(Storage(str(dataset.root)), f"runs/{name}")]


def test_a_run_says_what_happened(dataset: Dataset, straight: RunResult) -> None:
    steps = records(dataset, "straight", "step")
    assert [r.step for r in steps] == list(range(1, STEPS + 1))
    assert all(r.step_s and r.tokens_per_s and r.data_wait_s is not None and r.learning_rate for r in steps)
    assert [r.tokens for r in steps] == sorted(r.tokens for r in steps)
    assert [r.step for r in records(dataset, "straight", "validation")] == [0, 6, 12, 14]
    assert set(records(dataset, "straight", "validation")[-1].detail["streams"]) == {"a", "b"}
    saves = [r.detail for r in records(dataset, "straight", "checkpoint")]
    assert not any("error" in detail for detail in saves)
    assert (saves[0]["step"], saves[-1]["step"]) == (4, STEPS), "those between may have been put off by a slow disk"
    assert len(saves) >= 3 and all(detail["bytes"] > 0 for detail in saves)
    assert [r.kind for r in records(dataset, "straight", "start") + records(dataset, "straight", "end")] == ["start", "end"]
    assert straight.worker.step == STEPS
    assert straight.worker.train_loss == steps[-1].loss
    assert straight.worker.validation_loss == records(dataset, "straight", "validation")[-1].loss
    assert saved_steps(dataset, "straight")[0] == STEPS
    assert straight.worker.checkpoint == "runs/straight/checkpoints/step-00000014"


def test_a_step_in_which_nothing_is_learned_has_loss_0_and_ends_nothing(tmp_path: Path) -> None:
    """Rows of prompts alone, as a long dialogue that rows divide may give."""
    silent = [(tokens, np.zeros(len(tokens), np.float32)) for tokens, _ in documents(5, 40)]
    dataset = make_dataset(tmp_path, {"a": (silent + documents(6, 3), ())})
    spec = job(dataset, "silent", 60, batch={"rows": 1})
    run(spec)
    losses = [record.loss for record in records(dataset, "silent", "step")]
    assert len(losses) == 60 and 0.0 in losses and any(losses)


def test_going_on_is_bit_equal_to_going_straight_through(dataset: Dataset, straight: RunResult) -> None:
    """Halted in the middle of an epoch, with loader workers the second time."""
    run(job(dataset, "halted", 5))
    resumed = run(job(dataset, "halted", STEPS, loader_workers=2))
    assert curve(dataset, "halted") == curve(dataset, "straight")
    same: dict[str, Any] = {"checkpoint": "", "seconds": 0.0, "best": None}
    assert dataclasses.replace(resumed.worker, **same) == dataclasses.replace(straight.worker, **same)


def test_a_finished_run_returns_what_it_returned_and_trains_nothing(dataset: Dataset, straight: RunResult) -> None:
    again = run(job(dataset, "straight", STEPS))
    assert dataclasses.replace(again.worker, seconds=0.0) == dataclasses.replace(straight.worker, seconds=0.0)
    assert len(records(dataset, "straight", "step")) == STEPS
    assert run(job(dataset, "straight", STEPS - 3)).worker.step == STEPS


def test_a_damaged_checkpoint_is_passed_over_and_said(dataset: Dataset, straight: RunResult) -> None:
    run(job(dataset, "damaged", 10))
    before = saved_steps(dataset, "damaged")[1]
    newest = dataset.root / "runs/damaged/checkpoints/step-00000010/rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    run(job(dataset, "damaged", STEPS))
    start = records(dataset, "damaged", "start")[-1]
    assert start.step == before < 10
    assert list(start.detail["refused_checkpoints"]) == ["runs/damaged/checkpoints/step-00000010"]
    assert curve(dataset, "damaged") == curve(dataset, "straight")


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(dataset: Dataset, straight: RunResult) -> None:
    ended = run(job(dataset, "mended", 6))
    newest = dataset.root / "runs/mended" / Path(ended.worker.checkpoint).relative_to("runs/mended") / "rank-00000.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = run(job(dataset, "mended", 6))
    assert again.worker.train_loss == ended.worker.train_loss
    assert newest.read_bytes() == whole


def test_other_rows_under_the_same_run_are_refused(dataset: Dataset, straight: RunResult) -> None:
    spec = job(dataset, "straight", STEPS + 2)
    spec.recipe["batch"] = {"rows": 5}
    with pytest.raises(RunError, match=r"the checkpoint was made with batch\.rows 7, this run has 5"):
        run(spec)


def test_ranks_agree_with_one_and_go_on_from_each_other(dataset: Dataset, straight: RunResult) -> None:
    """Two ranks go on from step 4 bit-equal to the first time; one rank goes on from the two, within rounding."""
    run(job(dataset, "two", 9, workers=2))
    first_time = curve(dataset, "two")
    for step in saved_steps(dataset, "two"):
        if step != 4:
            shutil.rmtree(dataset.root / f"runs/two/checkpoints/step-{step:08d}")
    run(job(dataset, "two", 9, workers=2))
    assert [r.step for r in records(dataset, "two", "start")] == [0, 4]
    assert len(records(dataset, "two", "step")) == 9 + 5
    assert curve(dataset, "two") == first_time
    run(job(dataset, "two", STEPS))
    for step, (loss, norm) in curve(dataset, "straight").items():
        assert curve(dataset, "two")[step] == pytest.approx((loss, norm), rel=0, abs=1e-5)


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_never_saved(dataset: Dataset) -> None:
    """The learning rate explodes after a good checkpoint; losses are read seldom, so nobody looks at the bad step itself."""
    settings = {
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "clip_norm": 0.0},
        "schedule": {"kind": "custom", "factory": "training_jobs:explodes", "options": {"at": 6}},
        "logging": {"every_steps": 100},
        "validation": {"every_steps": 0},
    }
    with pytest.raises(TrainingError, match=r"the loss or the gradient of step 8 is not finite") as caught:
        run(job(dataset, "explodes", STEPS, **settings))
    assert "runs/explodes/checkpoints/step-00000004 (step 4)" in caught.value.hint
    assert saved_steps(dataset, "explodes") == [4]


def test_weights_of_a_folder_are_where_training_starts(dataset: Dataset, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**CONFIG, vocab_size=dataset.card.vocab_size, eos_token_id=dataset.card.eos_token_id)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    spec = job(dataset, "folder", 1, model={"kind": "folder", "path": "weights"})
    spec.site["sources"] = {"weights": str(tmp_path / "model")}
    run(spec)
    run(job(dataset, "seeded", 1))
    assert curve(dataset, "folder")[1] != curve(dataset, "seeded")[1]
