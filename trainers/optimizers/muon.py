"""Muon (Jordan et al. 2024): the matrices within blocks move by their momentum made orthogonal, all else by AdamW.

An update needs its whole matrix: where the engine shards, each rank gathers it, makes it orthogonal as all others do, and keeps
its own rows; so every number of ranks moves by the same numbers. A tensor of more than two dimensions is a stack of matrices
(the experts of a mixture), each made orthogonal by itself.

The update is scaled by 0.2 sqrt(larger side) (Liu et al. 2025, "Muon is Scalable for LLM Training"), which gives it the size of
AdamW's: learning rates and weight decay of AdamW fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from outgrow.recipes.schema.optimizer import Muon
from outgrow.trainers.optimizers.named import NamedOptimizer, fused_adamw, local, take_step
from outgrow.trainers.regions import local_part

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose five steps bring every singular value near 1 (Jordan et al. 2024)."""
_STEPS = 5
_EPS = 1e-7
"""The least norm that a matrix is divided by."""
_SIZE = 0.2
"""Root mean square of an update by AdamW, about (Liu et al. 2025)."""


class NamedMuon(NamedOptimizer):
    """Updates ``parameters`` by their ``.grad``; those of two or more dimensions that ``in_blocks`` names move by Muon."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Muon, in_blocks: Collection[str]) -> None:
        super().__init__(parameters, settings.clip_norm)
        self._settings = settings
        self._matrices = {name: p for name, p in self._parameters.items() if name in in_blocks and p.dim() >= 2}
        others = {name: p for name, p in self._parameters.items() if name not in self._matrices}
        self._adamw, states = fused_adamw(others, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        self._state = {
            name: states[name] if name in states else {"momentum": torch.zeros_like(p)} for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def _update(self, learning_rate: float) -> None:
        settings = self._settings
        take_step(self._adamw, learning_rate / settings.learning_rate * settings.adamw_learning_rate)
        for name, parameter in self._matrices.items():
            momentum, gradient = self._state[name]["momentum"], parameter.grad
            assert gradient is not None
            local(momentum).lerp_(local(gradient), 1 - settings.momentum)
            ahead = torch.lerp(local(gradient), local(momentum), settings.momentum)  # Nesterov's
            own = _own_rows(orthogonal(_whole(ahead, parameter)), parameter)
            values = local(parameter.detach())
            values.mul_(1 - learning_rate * settings.weight_decay)
            values.sub_(own.to(values.dtype), alpha=learning_rate * scale(parameter.shape))


def scale(shape: torch.Size) -> float:
    """What an orthogonal update of ``shape`` is multiplied with: its root mean square is then AdamW's."""
    return float(_SIZE * max(shape[-2:]) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` [..., a, b] with all its singular values near 1, by Newton-Schulz steps.

    In bfloat16 on a GPU, which these steps were made for; on a CPU in the type that ``matrix`` has.
    """
    first, second, third = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = first * x + (second * gram + third * gram @ gram) @ x
    made: torch.Tensor = x.mT if tall else x
    return made


def _whole(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole of what ``part`` is this rank's part of; a collective where ``parameter`` is sharded."""
    if not isinstance(parameter, DTensor):
        return part
    sharded = DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(), run_check=False
    )
    whole: torch.Tensor = sharded.full_tensor()
    return whole


def _own_rows(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return whole[local_part(parameter)[1].slices] if isinstance(parameter, DTensor) else whole
