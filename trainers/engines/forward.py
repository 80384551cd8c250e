"""One micro-batch through a model: the only place that knows how a transformers model is called."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import Batch
from outgrow.trainers.models.masks import attention_inputs
from outgrow.trainers.objective import weighted_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; itself where they are there already."""
    return Batch(**{f.name: getattr(batch, f.name).to(device, non_blocking=True) for f in fields(Batch)})


def batch_nll(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """``sum(weights * nll)`` of a batch on the model's device, a scalar; documents of one row do not see each other."""
    logits = model(input_ids=batch.token_ids, **attention_inputs(model.config, batch.segments, batch.positions)).logits
    return weighted_nll(logits, batch.targets, batch.weights)


def last_logits(
    model: PreTrainedModel, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Scores float32 [n, vocabulary] of what follows the last token of each row; arguments as in ``Batch``, on the model's
    device."""
    logits: torch.Tensor = model(input_ids=token_ids, **attention_inputs(model.config, segments, positions)).logits
    return logits[:, -1].float()


def batch_sums(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum(weights * nll)`` and ``sum(weights)`` of a batch, float64 so that a sum over many batches loses none."""
    return batch_nll(model, batch).double(), batch.weights.sum(dtype=torch.float64)
