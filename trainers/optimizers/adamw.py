"""AdamW (Loshchilov and Hutter 2019) over named parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from outgrow.recipes.schema.optimizer import AdamW
from outgrow.trainers.optimizers.named import NamedOptimizer, fused_adamw, take_step


class NamedAdamW(NamedOptimizer):
    """Updates ``parameters`` by their ``.grad``; norms, biases and all else of fewer than two dimensions do not decay."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: AdamW) -> None:
        super().__init__(parameters, settings.clip_norm)
        self._adamw, self._state = fused_adamw(
            self._parameters, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    def _update(self, learning_rate: float) -> None:
        take_step(self._adamw, learning_rate)
