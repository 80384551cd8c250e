"""What the parameters of an adapted model are before the first step, by name and box: the base's own, and drawn ones beside.

``B`` is zero, so a model begins as its base. ``A`` is drawn from (seed, its name) on the full shape and then sliced: the same
at any world size. DoRA's magnitudes are the lengths of the base's rows as the model computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.trainers.adapters.lora import ADAPTER_NAME, COMPUTE_DTYPE
from outgrow.trainers.models.initialise import module_seed
from outgrow.trainers.models.weights import row_parts
from outgrow.trainers.regions import Region, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = ".base_layer."
A = f".lora_A.{ADAPTER_NAME}.weight"
B = f".lora_B.{ADAPTER_NAME}.weight"
MAGNITUDE = f".lora_magnitude_vector.{ADAPTER_NAME}.weight"


class AdaptedWeights:
    """A ``TensorSource`` of all parameters of ``model``, which ``adapt`` has changed and an engine may have sharded.

    ``base`` has the frozen ones under the names that they had before. Where it keeps them packed, its method
    ``dequantised(name, region)`` gives the numbers that the model computes with.
    """

    def __init__(self, base: TensorSource, recipe: Recipe, model: PreTrainedModel) -> None:
        assert isinstance(recipe.adapter, Lora)
        self.base = base
        self._seed = recipe.run.seed
        self._compute = COMPUTE_DTYPE[recipe.precision]
        self._rows = getattr(base, "dequantised", base.read)
        self._names = [name for name, _ in model.named_parameters()]
        self._drawn: tuple[str, torch.Tensor] = ("", torch.empty(0))
        # By the modules' own figures: an engine may hold no parameter at its full shape.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._in_features: dict[str, int] = {}
        for name in self._names:
            if name.endswith((A, B, MAGNITUDE)):
                module = model.get_submodule(adapted_module(name))
                rank, out, into = recipe.adapter.rank, int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
                self._shapes[name] = (rank, into) if name.endswith(A) else (out, rank) if name.endswith(B) else (out,)
                self._in_features[name] = into

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self.base.shape(base_name(name))

    def read(self, name: str, region: Region) -> torch.Tensor:
        if name.endswith(A):
            return self._draw(name)[region.slices]
        if name.endswith(B):
            return torch.zeros(region.shape)
        if name.endswith(MAGNITUDE):
            return self._lengths(f"{adapted_module(name)}.weight", region, self._in_features[name])
        return self.base.read(base_name(name), region)

    def _draw(self, name: str) -> torch.Tensor:
        """The whole of ``A``, float32, as peft draws it: uniform, ``kaiming_uniform_`` with ``a = sqrt(5)``."""
        if self._drawn[0] != name:
            generator = torch.Generator().manual_seed(module_seed(self._seed, name))
            bound = 1 / math.sqrt(self._in_features[name])
            self._drawn = (name, torch.empty(self._shapes[name]).uniform_(-bound, bound, generator=generator))
        return self._drawn[1]

    def _lengths(self, name: str, region: Region, width: int) -> torch.Tensor:
        """The 2-norms of the base's rows ``region``, a few rows at a time."""
        lengths = []
        for part in row_parts((region.shape[0], width)):
            rows = self._rows(name, Region((region.offset[0] + part.offset[0], 0), part.shape)).to(self._compute)
            wide = torch.float64 if self._compute == torch.float64 else torch.float32
            lengths.append(torch.linalg.vector_norm(rows.to(wide), dim=1))
        return torch.cat(lengths)


def base_name(name: str) -> str:
    """The name that a frozen or wholly trained parameter had before ``adapt``."""
    return name.replace(BASE, ".")


def adapted_module(name: str) -> str:
    """The linear layer that a parameter of an adapter stands beside."""
    return name.removesuffix(A).removesuffix(B).removesuffix(MAGNITUDE)
