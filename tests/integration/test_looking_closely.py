"""A run that is tracked, profiled and asked to write along the way is bit for bit the run that is not, whatever breaks."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from token_stores import VOCAB, Dataset, documents, make_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from training_jobs import TRAIN_WORKER, curve, job, records, two_streams

from outgrow.cluster.local import run_local
from outgrow.contracts import StepRecord
from outgrow.monitoring.event_files import read_lines
from outgrow.monitoring.trackers import choice, tracking
from outgrow.storage import Storage

STEPS = 8


def train(dataset: Dataset, name: str, **recipe: Any) -> dict[int, tuple[float | None, float | None]]:
    run_local(job(dataset, name, STEPS, **recipe), TRAIN_WORKER, on_record=lambda record: None)
    return curve(dataset, name)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    made = two_streams(tmp_path_factory.mktemp("data"))
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = made.root / made.card.store / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def untouched(dataset: Dataset) -> dict[int, tuple[float | None, float | None]]:
    return train(dataset, "untouched", logging={"every_steps": 1, "trackers": []})


def test_prompts_a_profile_and_trackers_change_nothing(
    dataset: Dataset, untouched: dict[int, tuple[float | None, float | None]]
) -> None:
    looked_at = train(
        dataset,
        "looked-at",
        logging={"every_steps": 1, "trackers": ["tensorboard"]},
        validation={"every_steps": 6, "prompts": ["w5 w6", "w7"], "prompt_tokens": 5},
        profile={"start_step": 3, "steps": 2},
    )
    assert looked_at == untouched
    said = [record.detail["samples"] for record in records(dataset, "looked-at", "validation")]
    assert [[each["prompt"] for each in samples] for samples in said] == [["w5 w6", "w7"]] * 3
    assert any(each["text"] for samples in said for each in samples)
    folder = dataset.root / "runs/looked-at"
    assert [path.name for path in (folder / "profiles").iterdir()] == ["rank-00000-steps-3-4.trace.json.gz"]
    losses = {step: pytest.approx(loss, rel=1e-6) for step, (loss, _) in untouched.items()}
    assert dict(scalars(folder / "tensorboard", "train/loss")) == losses


def test_prompts_are_continued_where_no_rows_are_held_out(tmp_path: Path, dataset: Dataset) -> None:
    without = make_dataset(tmp_path, {"a": (documents(1, 61), ())})
    shutil.copytree(dataset.root / dataset.card.store / "tokenizer", without.root / without.card.store / "tokenizer")
    train(without, "bare", validation={"every_steps": 4, "prompts": ["w5"], "prompt_tokens": 3})
    said = records(without, "bare", "validation")
    assert [(record.step, record.loss, len(record.detail["samples"])) for record in said] == [(n, None, 1) for n in (0, 4, 8)]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(tag)]


class Hangs:
    def __init__(self, released: threading.Event) -> None:
        self._released = released

    def record(self, record: StepRecord) -> None:
        self._released.wait()

    def close(self) -> None:
        pass


def test_trackers_that_break_or_hang_change_nothing_and_the_file_says_so(
    dataset: Dataset, untouched: dict[int, tuple[float | None, float | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def broken(name: str, *arguments: object) -> Hangs:
        if name == "mlflow":
            raise OSError("no space left")
        return Hangs(released)

    monkeypatch.setattr(choice, "_tracker", broken)
    monkeypatch.setattr(tracking, "CLOSE_S", 0.5)
    assert train(dataset, "broken", logging={"every_steps": 1, "trackers": ["tensorboard", "mlflow"]}) == untouched
    released.set()
    notes = [line for line in read_lines(Storage(str(dataset.root)), "runs/broken") if "tracker" in line]
    assert sorted((note["tracker"], note["error"]) for note in notes) == [
        ("mlflow", "OSError: no space left"),
        ("tensorboard", "it has not come to an end in time"),
    ]
