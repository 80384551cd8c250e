"""Runs that forget on purpose: they train on a narrow stream and are measured on a general one; with a guard or without."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from token_stores import EOS, Dataset, Document, make_dataset
from training_jobs import job

from outgrow.contracts import Context, JobSpec, WorkerResult
from outgrow.storage import Storage

STEPS = 24
EVERY = 4


def of_tokens(seed: int, count: int, most: int) -> list[Document]:
    """``count`` documents of 20 to 60 tokens below ``most``."""
    rng = np.random.default_rng(seed)
    made: list[Document] = []
    for _ in range(count):
        tokens = rng.integers(1, most, int(rng.integers(20, 61)))
        tokens[-1] = EOS
        made.append((tokens, None))
    return made


def forgetful(root: Path) -> Dataset:
    """A narrow stream to train on, with rows held out, and a general one, partly of the same tokens, that is only validated on:
    its loss falls at first and then rises."""
    streams = {"narrow": (of_tokens(1, 80, 12), of_tokens(2, 8, 12)), "general": ([], of_tokens(3, 8, 18))}
    return make_dataset(root, streams, options={"general": {"use": "validation"}})


def guarded(dataset: Dataset, name: str, guard: dict[str, Any] | None, *, rate: float = 0.01, **changes: Any) -> JobSpec:
    """A run on it that validates and saves every ``EVERY`` steps; ``changes`` are what ``training_jobs.job`` takes."""
    recipe: dict[str, Any] = {
        "optimizer": {"kind": "adamw", "learning_rate": rate},
        "schedule": {"kind": "constant"},
        "validation": {"every_steps": EVERY, "on_rise": guard or {"kind": "none"}},
        "checkpoint": {"every_steps": EVERY, "keep_newest": 2, "best_by": "general"},
    }
    return job(dataset, name, STEPS, **{**recipe, **changes})


def drops(*, step: int, steps: int, at: int, to: float) -> float:
    """A custom schedule that falls to ``to`` of the peak at step ``at`` (from 0)."""
    return 1.0 if step < at else to


def dies_before_clearing_away(job: JobSpec, context: Context) -> WorkerResult:
    """``train_worker``, killed as soon as it is written down that the run goes back."""
    from outgrow.trainers import roll_back
    from outgrow.trainers.loop import train_worker

    clear_away = roll_back._clear_away

    def dies(storage: Storage, run_folder: str) -> tuple[roll_back.RollBack, ...]:
        if roll_back.read(storage, run_folder):
            os.kill(os.getpid(), signal.SIGKILL)
        return clear_away(storage, run_folder)

    roll_back._clear_away = dies
    return train_worker(job, context)
