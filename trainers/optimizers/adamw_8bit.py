"""AdamW whose moments are kept in 8 bits (Dettmers et al. 2022): about 2 bytes a parameter instead of 8.

Kept of the second moment is its root, which is what the update divides by: it spans half as many decades as the moment itself,
so that a small gradient beside a large one is not rounded to 0 and divided by. The update is computed from the moments before
they are rounded. Vectors and small tensors are kept in float32, as they weigh little and rounding hurts them most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from outgrow.recipes.schema.optimizer import AdamW8bit
from outgrow.trainers.optimizers.eight_bit import decode, encode, pieces, zero_codes
from outgrow.trainers.optimizers.named import NamedOptimizer, decays, fused_adamw, take_step

SMALLEST = 4096
"""Elements of a whole tensor; one with fewer is kept in float32."""


class NamedAdamW8bit(NamedOptimizer):
    """Updates ``parameters`` by their ``.grad``; the same at any number of ranks."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: AdamW8bit) -> None:
        super().__init__(parameters, settings.clip_norm)
        self._settings = settings
        self._coded = {name: p for name, p in self._parameters.items() if p.dim() >= 2 and p.numel() >= SMALLEST}
        others = {name: p for name, p in self._parameters.items() if name not in self._coded}
        self._adamw, states = fused_adamw(others, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        self._state = {name: states[name] if name in states else _zeros(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def _update(self, learning_rate: float) -> None:
        take_step(self._adamw, learning_rate)
        for name, parameter in self._coded.items():
            self._move(parameter, self._state[name], learning_rate)

    def _move(self, parameter: nn.Parameter, state: dict[str, torch.Tensor], learning_rate: float) -> None:
        assert parameter.grad is not None
        beta1, beta2 = self._settings.betas
        state["step"] += 1
        first, second = 1 - beta1 ** state["step"].double(), (1 - beta2 ** state["step"].double()).sqrt()
        parameter_tensors = (parameter.detach(), parameter.grad)
        for values, gradient, *coded in pieces(*parameter_tensors, *(state[name] for name in _CODED)):
            codes, scales, root_codes, root_scales = coded
            average = decode(codes, scales, signed=True).to(values.dtype).lerp_(gradient, 1 - beta1)
            square = decode(root_codes, root_scales, signed=False).to(values.dtype).square_().mul_(beta2)
            root = square.addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
            for target, source in zip((codes, scales), encode(average, signed=True), strict=True):
                target.copy_(source)
            for target, source in zip((root_codes, root_scales), encode(root, signed=False), strict=True):
                target.copy_(source)
            if decays(parameter):
                values.mul_(1 - learning_rate * self._settings.weight_decay)
            step_size = (learning_rate / first).to(values.dtype)
            values.sub_(average.div_(root.div_(second.to(values.dtype)).add_(self._settings.eps)).mul_(step_size))


_CODED = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_root_codes", "exp_avg_sq_root_scales")


def _zeros(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    tensors = (*zero_codes(parameter), *zero_codes(parameter))
    return {"step": step, **dict(zip(_CODED, tensors, strict=True))}
