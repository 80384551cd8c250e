"""A model with its adapter worked into the weights, tensor by tensor: ``W + s B A``, or DoRA's ``m (W + s B A) / |W + s B A|``.

LoRA: Hu et al. 2021; the scale ``s`` is ``alpha / rank``, of rsLoRA ``alpha / sqrt(rank)``. DoRA: Liu et al. 2024, the length
taken of each row. A row of the result needs that row of the base alone, so a few rows are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from outgrow.recipes.schema.adapter import Lora
from outgrow.trainers.adapters.lora import scaling
from outgrow.trainers.adapters.sources import MAGNITUDE, A, B
from outgrow.trainers.models.weights import row_parts
from outgrow.trainers.regions import Region, TensorSource

PREFIX = "model/"
"""What a checkpoint puts before the names of parameters."""


class MergedWeights:
    """A ``TensorSource`` of ``model/<name>`` for the ``names`` of the model without an adapter.

    ``trained`` is the checkpoint of an adapter; ``base`` has what was frozen beside it, under its own names.
    """

    def __init__(self, trained: TensorSource, base: TensorSource, adapter: Lora, names: Iterable[str]) -> None:
        self._trained = trained
        self._base = base
        self._rows = getattr(base, "dequantised", base.read)
        self._adapter = adapter
        self._names = tuple(names)
        self._held = frozenset(trained.names())

    def names(self) -> Collection[str]:
        return [PREFIX + name for name in self._names]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._held:
            return self._trained.shape(name)
        module = self._adapted(name)
        if module:
            return (*self._trained.shape(module + B)[:1], *self._trained.shape(module + A)[1:])
        return self._base.shape(name.removeprefix(PREFIX))

    def read(self, name: str, region: Region) -> torch.Tensor:
        """The values of ``region``: float32 where an adapter was worked in (float64 of a run in it), else as they are held."""
        if name in self._held:
            return self._trained.read(name, region)
        module = self._adapted(name)
        if not module:
            return self._base.read(name.removeprefix(PREFIX), region)
        a = self._whole(module + A)
        rows = Region((region.offset[0], 0), (region.shape[0], a.shape[1]))
        merged = torch.empty(rows.shape, dtype=a.dtype)
        for part in row_parts(rows.shape):
            box = Region((rows.offset[0] + part.offset[0], 0), part.shape)
            merged[part.slices] = self._merged(name, module, box, a)
        return merged[:, region.slices[1]]

    def _merged(self, name: str, module: str, rows: Region, a: torch.Tensor) -> torch.Tensor:
        base = self._rows(name.removeprefix(PREFIX), rows).to(a.dtype)
        b = self._trained.read(module + B, Region((rows.offset[0], 0), (rows.shape[0], a.shape[0])))
        merged = torch.addmm(base, b, a, alpha=scaling(self._adapter))
        if self._adapter.dora:
            lengths = self._trained.read(module + MAGNITUDE, Region(rows.offset[:1], rows.shape[:1]))
            merged *= (lengths / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged

    def _adapted(self, name: str) -> str:
        """The name in the checkpoint of the module whose adapter belongs to the weight ``name``; empty where there is none."""
        module = name.removesuffix(".weight")
        return module if name.endswith(".weight") and module + A in self._held else ""

    def _whole(self, name: str) -> torch.Tensor:
        shape = self._trained.shape(name)
        return self._trained.read(name, Region.whole(shape))
