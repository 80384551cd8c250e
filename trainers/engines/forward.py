"""One micro-batch through a model: the only place that knows how a transformers model is called.

An engine makes one ``Forward`` and gives it batches as the loader made them, on the CPU: what can be known of a batch without
the device (whether its rows are packed, which tokens count) is read there, before it moves, so that no step waits.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outgrow.contracts import IGNORE_INDEX, Batch
from outgrow.errors import ModelError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.speed import ChunkedLogits, WholeLogits
from outgrow.trainers.head_loss import ChunkedNll, HeadLoss, liger_nll
from outgrow.trainers.models.attention import set_attention
from outgrow.trainers.models.families import TESTED
from outgrow.trainers.models.masks import attention_inputs
from outgrow.trainers.models.on_device import moved
from outgrow.trainers.objective import weighted_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Forward:
    """How ``model`` is called for a loss and for scores, as the recipe says; made once, before or after the engine wraps it.

    ``through`` is what is called in place of ``model``, for an engine that wraps it in a module of its own. Raises
    ``ModelError`` for an attention or a loss that the model, the device or what is installed cannot do.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, device: torch.device, through: nn.Module | None = None) -> None:
        self._device = device
        self._config = model.config
        self._called = model if through is None else through
        self._last_alone = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._loss = None if isinstance(recipe.cross_entropy, WholeLogits) else head_loss(model, recipe)
        if self._loss is not None:
            _give_loss(model, self._loss)
        set_attention(model, recipe.attention, recipe.precision, device)

    def nll(self, batch: Batch) -> torch.Tensor:
        """``sum(weights * nll)`` of a batch, a scalar on the device; documents of one row do not see each other."""
        inputs = self._inputs(batch.token_ids, batch.segments, batch.positions)
        targets, weights = batch.targets.flatten(), batch.weights.flatten()
        if self._loss is None:
            logits = self._called(**inputs).logits.flatten(0, 1)
            return weighted_nll(logits, self._moved(targets), self._moved(weights))
        targets, positions = self._loss.readied(targets, weights), None
        counted = counted_positions(targets, self._loss.tokens) if self._loss.tokens else None
        if counted is not None:
            targets, weights, positions = targets[counted], weights[counted], self._moved(counted)
        nll: torch.Tensor = self._called(**inputs, loss_at=_LossAt(positions, self._moved(targets), self._moved(weights)))
        return nll

    def sums(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """``sum(weights * nll)`` and ``sum(weights)`` of a batch, float64 so that a sum over many batches loses none."""
        return self.nll(batch).double(), self._moved(batch.weights.sum(dtype=torch.float64))

    def last_logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores float32 [n, vocabulary] of what follows the last token of each row; arguments as in ``Batch``, [n, L]."""
        last_alone = {"logits_to_keep": 1} if self._last_alone else {}
        logits: torch.Tensor = self._called(**self._inputs(token_ids, segments, positions), **last_alone).logits
        return logits[:, -1].float()

    def _inputs(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        """Arguments of the model's forward, on the device."""
        return {"input_ids": self._moved(token_ids), **attention_inputs(self._config, segments, positions, self._device)}

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return moved(tensor, self._device)


class _LossAt:
    """What the loss is of: ``positions`` int64 of tokens among all of the batch (None: all), their targets and weights.

    An object of ours, neither a tuple nor a dataclass: FSDP2 casts every float that it finds in those to bfloat16, and a weight
    of 0.3 would be another.
    """

    __slots__ = ("positions", "targets", "weights")

    def __init__(self, positions: torch.Tensor | None, targets: torch.Tensor, weights: torch.Tensor) -> None:
        self.positions = positions
        self.targets = targets
        self.weights = weights


def counted_positions(targets: torch.Tensor, chunk: int) -> torch.Tensor | None:
    """Where in ``targets`` [n], on the CPU, there is one: int64; None where leaving out the others would save no chunk.

    Prompts of dialogues and padding need no scores.
    """
    counted = targets != IGNORE_INDEX
    if -(-int(counted.sum()) // chunk) == -(-len(targets) // chunk):
        return None
    return counted.nonzero().squeeze(1)


def head_loss(model: PreTrainedModel, recipe: Recipe) -> HeadLoss:
    """The loss from hidden states that the recipe asks for."""
    family = model.config.model_type
    if family not in TESTED:
        raise ModelError(
            f"cross_entropy {recipe.cross_entropy.kind} is not known to be right for {family}: how scores follow from hidden "
            f"states is known of {', '.join(TESTED)}",
            where="cross_entropy",
            hint="cross_entropy: {kind: whole}",
        )
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    if isinstance(recipe.cross_entropy, ChunkedLogits):
        return ChunkedNll(recipe.cross_entropy.tokens, cap)
    return liger_nll(model.get_output_embeddings(), cap)  # type: ignore[no-untyped-call]


def _give_loss(model: PreTrainedModel, loss: HeadLoss) -> None:
    """Make ``model(..., loss_at=)`` return the loss.

    ``forward`` is replaced, of the model and of its head, and not called from outside: the hooks of engines that gather
    parameters around a module then still do.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.forward = partial(_head_forward, head, head.forward, loss)
    model.forward = partial(_model_forward, model, head, model.forward)


def _model_forward(
    model: PreTrainedModel, head: nn.Module, forward: Any, *args: Any, loss_at: _LossAt | None = None, **kwargs: Any
) -> Any:
    if loss_at is None:
        return forward(*args, **kwargs)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    hidden = decoder(*args, **kwargs).last_hidden_state.flatten(0, 1)
    if loss_at.positions is not None:
        hidden = hidden.index_select(0, loss_at.positions)
    return head(hidden, loss_at)


def _head_forward(
    head: nn.Module,
    forward: Any,
    loss: HeadLoss,
    hidden: torch.Tensor,
    loss_at: _LossAt | None = None,
) -> Any:
    return forward(hidden) if loss_at is None else loss(head, forward, hidden, loss_at.targets, loss_at.weights)
