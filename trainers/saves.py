"""When a run is saved, decided equally on all ranks, and what came of it."""

from __future__ import annotations

import time

import torch

from outgrow.errors import TrainingError
from outgrow.trainers.checkpoint.commit import StepState
from outgrow.trainers.checkpoint.saving import Checkpointer, SaveResult
from outgrow.trainers.engines import Engine

_POLL_S = 0.05


class Saves:
    """Saves every ``every_steps`` steps; one that is due while the last is still being written is put off, not dropped."""

    def __init__(self, engine: Engine, checkpointer: Checkpointer, every_steps: int, device: torch.device) -> None:
        self._engine = engine
        self._checkpointer = checkpointer
        self._every_steps = every_steps
        self._device = device
        self._put_off = False
        self._ended: list[SaveResult] = []

    def due(self, step: int) -> bool:
        """Whether ``save`` should be called after finished step number ``step``."""
        return self._put_off or step % self._every_steps == 0

    def save(self, state: StepState) -> None:
        """Begin a save, or put it off to the next step where some rank is still writing the last one. A collective."""
        self._put_off = self._any_rank(self._checkpointer.busy())
        if not self._put_off:
            self._checkpointer.save(self._engine.tensors(), state)

    def save_last(self, state: StepState) -> None:
        """Save and wait until it is committed. Raises ``TrainingError`` on all ranks where it was not. A collective."""
        self.wait()  # so that what fails from here on is this save and not the one before
        before = self._checkpointer.failures
        self._checkpointer.save(self._engine.tensors(), state)
        self.wait()
        if self._any_rank(self._checkpointer.failures > before):
            self._ended += self._checkpointer.results()
            reason = "; ".join(result.error for result in self._ended if result.step == state.step)
            raise TrainingError(
                f"the checkpoint of the last step ({state.step}) was not committed: {reason or 'see rank 0'}",
                hint="make room or mend the storage; the same command then goes on from the checkpoint before",
            )

    def wait(self) -> None:
        """Returns when no save is in flight on any rank, rank 0's commit included. A collective.

        Ranks ask each other again and again: one long collective would run into the group's timeout during a slow upload.
        """
        while self._any_rank(self._checkpointer.busy()):
            time.sleep(_POLL_S)

    def give_up(self) -> None:
        """``wait``, and owe no save any more: the run goes on from an earlier step. A collective."""
        self.wait()
        self._put_off = False

    def results(self) -> list[SaveResult]:
        """The saves that ended since this was asked last."""
        ended, self._ended = self._ended + self._checkpointer.results(), []
        return ended

    def close(self) -> None:
        self._checkpointer.close()

    def _any_rank(self, flag: bool) -> bool:
        return bool(self._engine.reduce_sum(torch.tensor(float(flag), device=self._device)).item() > 0)
