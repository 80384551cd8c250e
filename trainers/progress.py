"""How far a run has come: what its records and its result say, and what a checkpoint keeps to go on counting."""

from __future__ import annotations

import time
from collections.abc import Mapping

from outgrow.contracts import BestCheckpoint, JsonDict, StepRows, WorkerResult
from outgrow.trainers.checkpoint.retention import VALIDATION_LOSS
from outgrow.trainers.guard import GuardState
from outgrow.trainers.validation import ValidationLoss


class Progress:
    """Counts over the whole run, earlier starts included. ``step`` is the number of finished steps; losses are nats a token."""

    def __init__(self, step: int = 0, metrics: Mapping[str, float | None] | None = None) -> None:
        """From the start, or from a checkpoint's step and metrics."""
        saved = metrics or {}
        self.is_new = metrics is None
        self.guard = GuardState.of(saved)
        self.ended = ""
        """Why the run ended before its last step."""
        self.step = step
        self.epoch = 0
        self.tokens = int(saved.get("tokens") or 0)
        self.train_loss = saved.get("train_loss")
        self.validation_loss = saved.get(VALIDATION_LOSS)
        self._earlier_s = saved.get("seconds") or 0.0
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds spent in training, up to the checkpoint and since."""
        return self._earlier_s + time.monotonic() - self._since

    def advance(self, rows: StepRows) -> None:
        """Count a finished step."""
        self.step = rows.step + 1
        self.epoch = rows.epoch
        self.tokens += rows.tokens

    def metrics(self, measured: ValidationLoss | None) -> JsonDict:
        """What a checkpoint keeps; ``measured`` is of this very step or None, as checkpoints are compared by it."""
        return {
            "tokens": float(self.tokens),
            "train_loss": self.train_loss,
            VALIDATION_LOSS: None,
            **(measured.metrics() if measured else {}),
            **self.guard.metrics(),
            "seconds": self.seconds,
        }

    def result(self, checkpoint: str, best: BestCheckpoint | None) -> WorkerResult:
        """The end of the run, whose last step is in the folder ``checkpoint``; ``best`` is its best one."""
        assert self.train_loss is not None
        return WorkerResult(
            step=self.step,
            tokens=self.tokens,
            train_loss=self.train_loss,
            validation_loss=self.validation_loss,
            checkpoint=checkpoint,
            seconds=self.seconds,
            ended=self.ended,
            best=best,
        )
