"""What is minimised: the cross-entropy of the next token of the same document, each target with its own weight.

The loss of a step is ``sum(weights * nll) / global sum(weights)`` over all rows of all ranks. The denominator is known from the
row index before the step, so that every micro-batch on every rank only adds its share and no average of averages appears.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from outgrow.contracts import IGNORE_INDEX


def weighted_nll(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum of ``weights * nll`` in nats: a scalar, float32 (float64 where the logits are).

    ``logits`` [..., vocabulary] of any floating type are raised to float32 first, as a bfloat16 softmax loses the small
    probabilities. ``targets`` int64 [...]; those that are ``IGNORE_INDEX`` count nothing. ``weights`` float32 [...].
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(exact.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return (nll * weights.flatten()).sum()
