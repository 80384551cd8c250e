"""Optimizers over named parameters, the same in every engine that steps by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import nn

from outgrow.recipes.schema import optimizer as settings
from outgrow.trainers.optimizers.adamw import NamedAdamW
from outgrow.trainers.optimizers.adamw_8bit import NamedAdamW8bit
from outgrow.trainers.optimizers.muon import NamedMuon

__all__ = ["Optimizer", "make_optimizer"]


class Optimizer(Protocol):
    """Moves named parameters by their ``.grad``; what it keeps is made at once, so that names and memory never change."""

    def squared_norm(self) -> torch.Tensor:
        """The sum of squares of the gradients that this rank holds, a scalar on the device."""

    def step(self, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Clip by the global ``grad_norm`` (on the device), update, drop the gradients."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """``model/<parameter>`` and ``optim/<parameter>/<state>``, views without a graph."""


def make_optimizer(parameters: Mapping[str, nn.Parameter], chosen: settings.Optimizer, in_blocks: Collection[str]) -> Optimizer:
    """The recipe's optimizer over ``parameters``; ``in_blocks`` names those of them that lie within transformer blocks."""
    if isinstance(chosen, settings.AdamW):
        return NamedAdamW(parameters, chosen)
    if isinstance(chosen, settings.AdamW8bit):
        return NamedAdamW8bit(parameters, chosen)
    return NamedMuon(parameters, chosen, in_blocks)
