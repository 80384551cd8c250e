"""Which committed checkpoints to keep: the newest, and those with the lowest validation loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from outgrow.trainers.checkpoint.catalog import Saved

VALIDATION_LOSS = "validation_loss"
"""The metric that ``best`` goes by; nats a weighted token."""


@dataclass(frozen=True)
class Retention:
    """How many to keep: the ``newest`` by step (at least 1), and of the others the ``best`` by validation loss."""

    newest: int
    best: int


def to_remove(saved: Sequence[Saved], step: int, retention: Retention, distrusted: Collection[str]) -> list[Saved]:
    """Those of ``saved`` that need not be kept now that ``step`` has been committed.

    Checkpoints that did not load (``distrusted``) and those of later steps, which a run that fell back will replace, are
    evidence: they are neither removed nor counted, so they never push out a good one.
    """
    trusted = [s for s in saved if s.ref.folder not in distrusted and s.ref.step <= step]
    by_step = sorted(trusted, key=lambda s: s.ref.step, reverse=True)
    others = by_step[retention.newest :]
    measured = [(loss, -s.ref.step, s) for s in others if (loss := s.manifest.metrics.get(VALIDATION_LOSS)) is not None]
    best = [s for _, _, s in sorted(measured, key=lambda entry: entry[:2])[: retention.best]]
    return [s for s in others if s not in best]
