"""Weights for measurements: drawn on the device, one tensor at a time, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Collection

import torch

from outgrow.trainers.regions import Region


class RandomWeights:
    """A ``TensorSource`` drawn on ``device`` as it is asked for: matrices in bfloat16, vectors of ones."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._shapes = {name.replace(".base_layer.", "."): tuple(p.shape) for name, p in model.named_parameters()}

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, region: Region) -> torch.Tensor:
        if len(region.shape) == 1:
            return torch.ones(region.shape, device=self._device)
        return self.drawn(*region.shape)

    def drawn(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self._device, dtype=torch.bfloat16).normal_(std=0.02)
