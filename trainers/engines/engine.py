"""What the loop knows of an engine: gradients in, one update out, and tensors by name for checkpoints.

An engine holds a model, its optimizer's state and nothing else of a run. All that it returns stays on the device; the loop
decides when to pay for reading a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from outgrow.contracts import Batch
from outgrow.monitoring.recording.slots import Phase
from outgrow.trainers.regions import Held, TensorSource

Mark: TypeAlias = Callable[[Phase], None]
"""Called where a phase of a step begins."""


def unmarked(phase: Phase) -> None:
    """The ``Mark`` of who does not ask how long phases take."""


@dataclass(frozen=True)
class StepSums:
    """What one step came to, as scalars on the device.

    ``loss`` is this rank's share of the step's loss: ``Engine.reduce_sum`` makes it the loss of the global batch.
    ``grad_norm`` is the 2-norm of the global gradient before clipping, equal on every rank.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor


class Engine(Protocol):
    """One rank's part of a model in training. Every method but ``tensors`` is called by all ranks in the same order."""

    def accumulate(self, batch: Batch, global_weight: float, mark: Mark) -> None:
        """Add the gradient of ``sum(weights * nll) / global_weight`` of one micro-batch.

        Called ``Layout.accumulation`` times a step, ``global_weight`` being that of the whole step. ``mark("backward")`` is
        called between the forward pass and the backward pass.
        """

    def finish(self) -> StepSums:
        """The sums of the step, after its last micro-batch. Gradients stay for ``apply``."""

    def apply(self, learning_rate: float) -> None:
        """Clip, update the parameters, and drop the gradients."""

    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """``sum(weights * nll)`` and ``sum(weights)`` of this rank's batch, scalars on the device; no gradients, no dropout."""

    def logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores float32 [n, vocabulary] on the device of what follows the last token of each row; no gradients, no dropout.

        Arguments as in ``Batch``, [n, L], equal on all ranks.
        """

    def tensors(self) -> Mapping[str, Held]:
        """Views of all that a checkpoint keeps: ``model/<parameter>`` and ``optim/<parameter>/<state>``, of what is trained.

        DTensors where the engine shards, ``FlatPart`` where it cuts parameters into flat pieces. Tied parameters stand once,
        under the first of their names. The names and shapes are the same from before the first step to the end of the run.
        """

    def load(self, source: TensorSource) -> None:
        """Fill every one of ``tensors()``."""

    def load_model(self, source: TensorSource, prefix: str = "") -> None:
        """Fill all parameters, frozen ones too, with ``<prefix><parameter>``; the optimizer stays as it was made."""

    def load_frozen(self, source: TensorSource) -> None:
        """Fill the parameters that are not trained and so are in no checkpoint. Nothing to do where all are trained."""

    def reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` summed over all ranks, on every rank."""
