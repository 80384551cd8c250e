"""How far a run has come: what its records and its result say, and what a checkpoint keeps to go on counting."""

from __future__ import annotations

import time
from collections.abc import Mapping

from outgrow.contracts import JsonDict, StepRows, WorkerResult
from outgrow.trainers.checkpoint.retention import VALIDATION_LOSS


class Progress:
    """Counts over the whole run, earlier starts included. ``step`` is the number of finished steps; losses are nats a token."""

    def __init__(self, step: int = 0, metrics: Mapping[str, float | None] | None = None) -> None:
        """From the start, or from a checkpoint's step and metrics."""
        saved = metrics or {}
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

    def metrics(self, validation_loss: float | None) -> JsonDict:
        """What a checkpoint keeps; ``validation_loss`` is of this very step or None, as checkpoints are compared by it."""
        return {
            "tokens": float(self.tokens),
            "train_loss": self.train_loss,
            VALIDATION_LOSS: validation_loss,
            "seconds": self.seconds,
        }

    def result(self, checkpoint: str) -> WorkerResult:
        """The end of the run, whose last step is in the folder ``checkpoint``."""
        assert self.train_loss is not None
        return WorkerResult(
            step=self.step,
            tokens=self.tokens,
            train_loss=self.train_loss,
            validation_loss=self.validation_loss,
            checkpoint=checkpoint,
            seconds=self.seconds,
        )
