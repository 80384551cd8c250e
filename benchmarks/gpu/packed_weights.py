"""Random weights of which some are packed in 4 bits; needs bitsandbytes."""

from __future__ import annotations

import torch
from random_weights import RandomWeights

from outgrow.trainers.adapters.nf4 import Scales, quantise, quantise_scales, quantised_layers
from outgrow.trainers.regions import Region


class PackedRandomWeights(RandomWeights):
    """As ``RandomWeights``; matrices of layers in 4 bits come packed.

    Each is drawn in bfloat16 and quantised there, one at a time: the model in bfloat16 is never in memory.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self._packed = {f"{name}.weight": layer for name, layer in quantised_layers(model)}
        self._scales: dict[str, Scales] = {}

    def read(self, name: str, region: Region) -> torch.Tensor:
        layer = self._packed.get(name)
        if layer is None:
            return super().read(name, region)
        matrix = self.drawn(layer.out_features, layer.in_features)
        packed, scales = quantise(matrix.to(layer.compute_dtype), layer.compute_dtype)
        self._scales[name] = quantise_scales(scales)
        return packed[region.slices]

    def scales(self, weight: str) -> Scales:
        return self._scales[weight]
