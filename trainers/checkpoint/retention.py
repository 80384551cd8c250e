"""Which committed checkpoints to keep: the newest, and those with the lowest validation loss; and which of them is the best."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from outgrow.contracts import BestCheckpoint
from outgrow.errors import RunError
from outgrow.recipes.schema.training import TOTAL
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import Saved, survey

VALIDATION_LOSS = "validation_loss"
"""The loss over the streams that are trained on, in a checkpoint's metrics; nats a weighted token."""


def loss_key(metric: str) -> str:
    """Where a checkpoint's metrics have the validation loss that a recipe calls ``metric``: ``total``, or a stream by name."""
    return VALIDATION_LOSS if metric == TOTAL else f"{VALIDATION_LOSS}/{metric}"


@dataclass(frozen=True)
class Retention:
    """How many to keep: the ``newest`` by step (at least 1), and of the others the ``best`` by their validation loss
    ``metric``: ``total``, or a stream by name."""

    newest: int
    best: int
    metric: str = TOTAL


def to_remove(saved: Sequence[Saved], step: int, retention: Retention, distrusted: Collection[str]) -> list[Saved]:
    """Those of ``saved`` that need not be kept now that ``step`` has been committed.

    Checkpoints that did not load (``distrusted``) and those of later steps, which a run that fell back will replace, are
    evidence: they are neither removed nor counted, so they never push out a good one.
    """
    trusted = [s for s in saved if s.ref.folder not in distrusted and s.ref.step <= step]
    by_step = sorted(trusted, key=lambda s: s.ref.step, reverse=True)
    others = by_step[retention.newest :]
    best = _by_loss(others, retention.metric)[: retention.best]
    return [s for s in others if s not in best]


def best_of(saved: Sequence[Saved], metric: str) -> Saved | None:
    """The one with the lowest validation loss ``metric``, the latest of equals; None where none was measured."""
    return next(iter(_by_loss(saved, metric)), None)


def best_checkpoint(storage: Storage, run_folder: str, metric: str) -> BestCheckpoint:
    """The committed checkpoint of a run with the lowest validation loss ``metric``. Raises ``RunError`` where none has it."""
    best = best_of(survey(storage, run_folder).saved, metric)
    if best is None:
        raise RunError(
            f"no checkpoint was made at a validation that measured {metric}, so none is the best",
            where=run_folder,
            hint="let checkpoint.every_steps and validation.every_steps fall on the same steps; or take one by its --step",
        )
    return as_best(best, metric)


def as_best(saved: Saved, metric: str) -> BestCheckpoint:
    """What is said of the best checkpoint, which has the metric."""
    return BestCheckpoint(folder=saved.ref.folder, step=saved.ref.step, metric=metric, loss=_loss(saved, metric))


def _by_loss(saved: Sequence[Saved], metric: str) -> list[Saved]:
    """Those that were measured, the lowest first."""
    measured = [s for s in saved if not math.isnan(_loss(s, metric))]
    return sorted(measured, key=lambda s: (_loss(s, metric), -s.ref.step))


def _loss(saved: Saved, metric: str) -> float:
    loss = saved.manifest.metrics.get(loss_key(metric))
    return math.nan if loss is None else loss
