"""Jobs for ``train_worker``: a tiny Llama on a token store of known documents, and what such a run wrote down."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from token_stores import Dataset, documents, make_dataset

from outgrow.contracts import JobSpec, RunRef, StepRecord
from outgrow.monitoring.events import read_events
from outgrow.storage import Storage

TRAIN_WORKER = "outgrow.trainers.loop:train_worker"
CONFIG = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
RECIPE: dict[str, Any] = {
    "model": {"kind": "architecture", "family": "llama", "config": CONFIG},
    "precision": "fp32",
    "optimizer": {"learning_rate": 0.01},
    "schedule": {"kind": "constant", "warmup_steps": 3},
    "checkpoint": {"every_steps": 4, "keep_newest": 3},
    "validation": {"every_steps": 6},
    "logging": {"every_steps": 1},
}


def two_streams(root: Path) -> Dataset:
    """Two streams, weighted in part, whose rows divide by nothing; held-out documents in both."""
    return make_dataset(
        root,
        {
            "a": (documents(1, 61, weighted=True), documents(2, 7)),
            "b": (documents(3, 23), documents(4, 5)),
        },
    )


def job(dataset: Dataset, run: str, steps: int, *, workers: int = 1, loader_workers: int = 0, **recipe: Any) -> JobSpec:
    """``steps`` optimizer steps of 7 rows in the run folder ``runs/<run>``."""
    base = dataset.job(rows=7, workers=loader_workers)
    folder = f"runs/{run}"
    (dataset.root / folder).mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(
        base,
        recipe={**base.recipe, **RECIPE, "duration": {"steps": steps}, **recipe},
        run=RunRef(name=run, folder=folder, fingerprint=run),
        workers=workers,
    )


def records(dataset: Dataset, run: str, kind: str) -> list[StepRecord]:
    """What the run wrote to its ``events.jsonl``, in order, of one kind."""
    return [r for r in read_events(Storage(str(dataset.root)), f"runs/{run}") if r.kind == kind]


def curve(dataset: Dataset, run: str) -> dict[int, tuple[float | None, float | None]]:
    """Loss and gradient norm by step; of a step that was trained twice, the later."""
    return {r.step: (r.loss, r.grad_norm) for r in records(dataset, run, "step")}


def explodes(*, step: int, steps: int, at: int) -> float:
    """A custom schedule that goes wrong at step ``at`` (from 0)."""
    return 1.0 if step < at else 1e30
