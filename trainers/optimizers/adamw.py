"""AdamW over named parameters with its whole state made at once, and gradient clipping that never waits for the device.

One implementation (PyTorch's fused kernel) for all engines, so that losses agree. The state is zeros from the start: its
memory is taken before the first step, and a checkpoint has the same names at every step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from outgrow.recipes.schema.optimizer import AdamW

_CLIP_EPS = 1e-6
"""Added to the norm that gradients are divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""


class NamedAdamW:
    """Updates ``parameters`` by their ``.grad``; norms, biases and all else of fewer than two dimensions do not decay."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: AdamW) -> None:
        self._parameters = dict(parameters)
        self._clip_norm = settings.clip_norm
        matrices = [p for p in self._parameters.values() if p.dim() >= 2]
        vectors = [p for p in self._parameters.values() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=settings.betas, eps=settings.eps, fused=True
        )
        for parameter in self._parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def squared_norm(self) -> torch.Tensor:
        """The sum of squares of the gradients that this rank holds, a scalar on the device.

        A parameter that no token reached (an expert without tokens) counts, and is updated, with a gradient of zero.
        """
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return torch.stack(torch._foreach_norm(self._gradients())).square().sum()

    def step(self, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Scale the gradients down to the clipping norm, update, drop them. ``grad_norm``: the global one, on the device."""
        if self._clip_norm > 0:
            scale = (self._clip_norm / (grad_norm + _CLIP_EPS)).clamp(max=1.0)
            torch._foreach_mul_(self._gradients(), scale)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """``model/<parameter>`` and ``optim/<parameter>/<state>``, views without a graph."""
        named = {f"model/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for state, value in self._adamw.state[parameter].items():
                named[f"optim/{name}/{state}"] = value.detach()
        return named

    def _gradients(self) -> list[torch.Tensor]:
        return [_local(parameter.grad) for parameter in self._parameters.values() if parameter.grad is not None]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
