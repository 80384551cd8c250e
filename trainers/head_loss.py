"""Head and cross-entropy in one, some tokens at a time, so that the scores of all tokens are never in memory together.

The gradient is worked out while the scores of a chunk are there, in the forward pass, as Liger does (Hsu et al. 2024): each
product is made once, where recomputing scores in the backward pass would make that of the head twice. The backward pass only
multiplies by the gradient of the loss. What is kept from one pass to the other is the gradient of the hidden states, and that
of the head's weight where it is trained, which adds up in float32 over the chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from outgrow.contracts import IGNORE_INDEX
from outgrow.errors import ModelError
from outgrow.trainers.objective import weighted_nll

Scores: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class HeadLoss(Protocol):
    """``sum(weights * nll)`` from hidden states [n, width], ``targets`` int64 [n] and ``weights`` float32 [n].

    ``scores`` is what the head computes scores with: its ``forward``, of which there may be more than its weight. Called within
    the head's own call. ``tokens``: how many are done at a time, so that it pays to leave out that many; None: leave out none.
    """

    @property
    def tokens(self) -> int | None: ...

    def readied(self, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The targets as the loss is to be given them, from those of a batch on the CPU.

        Raises ``ModelError`` for weights that it cannot do.
        """

    def __call__(
        self, head: nn.Module, scores: Scores, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class ChunkedNll:
    """``sum(weights * nll)`` from hidden states, ``tokens`` at a time; ``cap`` as in ``soft_capped``."""

    tokens: int
    cap: float | None = None

    def readied(self, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return targets

    def __call__(
        self, head: nn.Module, scores: Scores, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """A scalar in float32, in float64 where ``hidden`` is."""
        if not _is_one_product(head):
            return self._again(scores, hidden, targets, weights)
        gradients = torch.is_grad_enabled()
        found: torch.Tensor = _HeadNll.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, weights, self.tokens, self.cap, gradients
        )
        return found

    def _again(self, scores: Scores, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """For a head that is more than one product, with an adapter beside it: each chunk is computed again on the way back."""
        total = torch.zeros((), dtype=_exact(hidden.dtype), device=hidden.device)
        for part in zip(*(torch.split(tensor, self.tokens) for tensor in (hidden, targets, weights)), strict=True):
            total = total + checkpoint(self._whole, scores, *part, use_reentrant=False, preserve_rng_state=False)
        return total

    def _whole(self, scores: Scores, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weighted_nll(soft_capped(scores(hidden), self.cap), targets, weights)


class LigerNll:
    """Liger's fused kernel of head and cross-entropy (Hsu et al. 2024); ``loss`` is its module, summing over tokens.

    It knows no weights of single tokens: those of a batch must be one number, or 0.
    """

    tokens = None

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        self._loss = loss

    def readied(self, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        targets = torch.where(weights == 0, IGNORE_INDEX, targets)
        distinct = torch.unique(weights[targets != IGNORE_INDEX])
        if len(distinct) > 1:
            raise ModelError(
                "cross_entropy is liger, whose kernel counts every target alike; "
                f"weights of this batch go from {distinct[0]:g} to {distinct[-1]:g}",
                where="cross_entropy",
                hint="cross_entropy: {kind: chunked}",
            )
        return targets

    def __call__(
        self, head: nn.Module, scores: Scores, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self._loss(head.weight, hidden, targets, head.bias).float() * weights.max()


def liger_nll(head: nn.Module, cap: float | None) -> LigerNll:
    """Liger's loss; ``ModelError`` where it is not installed, and for a head with an adapter."""
    if not _is_one_product(head):
        raise ModelError(
            "cross_entropy is liger, which takes a head without an adapter",
            where="cross_entropy",
            hint="cross_entropy: {kind: chunked}",
        )
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            f"cross_entropy is liger, which cannot be imported: {error}",
            where="cross_entropy",
            hint="pip install liger-kernel, or cross_entropy: {kind: chunked}, which needs nothing",
        ) from error
    options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "reduction": "sum", "softcap": cap}
    if "accum_dtype" in inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters:
        options["accum_dtype"] = torch.float32
    return LigerNll(LigerFusedLinearCrossEntropyLoss(**options))


def soft_capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(scores / cap)``, as Gemma 2 bounds its scores; the scores themselves without a cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


class _HeadNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        tokens: int,
        cap: float | None,
        gradients: bool,
    ) -> torch.Tensor:
        exact = _exact(hidden.dtype)
        wanted = [gradients and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=exact) if wanted[2] and bias is not None else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), tokens):
            part = slice(start, start + tokens)
            scores = nn.functional.linear(hidden[part], weight, bias)
            nll, d_scores = _nll_and_gradient(scores, targets[part], weights[part].to(exact), cap, any(wanted))
            del scores
            total += nll
            if d_bias is not None:
                d_bias += d_scores.sum(0)
            # To the type of the weights for the products, as the backward pass of a linear layer has it.
            d_scores = d_scores.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_scores, weight, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_scores.t(), hidden[part])
            del d_scores
        ctx.gradients = tuple(
            None if gradient is None else gradient.to(hidden.dtype) for gradient in (d_hidden, d_weight, d_bias)
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, as that of the weight is large; they are gone afterwards.
        found = tuple(None if gradient is None else gradient.mul_(grads[0]) for gradient in ctx.gradients)
        del ctx.gradients
        return (*found, None, None, None, None, None)


def _nll_and_gradient(
    scores: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float | None, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum over a chunk, and its gradient to the scores before the cap; little more than one copy of the scores.

    A target that is ``IGNORE_INDEX`` counts nothing, whatever its weight.
    """
    counted = targets != IGNORE_INDEX
    weights = torch.where(counted, weights, 0)
    at = torch.where(counted, targets, 0)[:, None]
    slope = None
    # In place from here on: the first of these makes a copy unless the scores are this exact already.
    scores = scores.to(weights.dtype)
    if cap is not None:
        scores.div_(cap).tanh_()
        slope = scores.square().neg_().add_(1) if gradient else None
        scores.mul_(cap)
    scores.sub_(scores.amax(1, keepdim=True))
    of_target = scores.gather(1, at)
    scores.exp_()
    sums = scores.sum(1, keepdim=True)
    nll = ((sums.log() - of_target).squeeze(1) * weights).sum()
    if gradient:
        scores.mul_(weights[:, None] / sums)
        # Not scatter_add_, which waits for the GPU where sums are to have a fixed order.
        scores.index_put_((torch.arange(len(at), device=at.device), at[:, 0]), -weights, accumulate=True)
        if slope is not None:
            scores.mul_(slope)
    return nll, scores


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``, the sum over chunks in the type of ``total`` whatever that of the factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _is_one_product(head: nn.Module) -> bool:
    """Whether a head is a linear layer and no more, FSDP2's subclass of one too: not with an adapter, not in 4 bits."""
    return type(head).forward is nn.Linear.forward


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
