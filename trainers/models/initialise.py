"""Weights made from nothing: each parameter a function of (seed, its name) alone, by the family's own rules of initialisation.

transformers' ``_init_weights(module)`` draws from torch's global generator in the order of the modules, so what a parameter
gets depends on all before it. Here each module is drawn by itself, from a generator seeded with the run's seed and the module's
name, on the full shape, on the CPU and in float32. A rank slices what it holds: the same model is born at any world size.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from outgrow.errors import ModelError
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.regions import Region


class SeededWeights:
    """A ``TensorSource`` of freshly drawn parameters, float32. Holds one module's parameters at a time."""

    def __init__(self, config: PretrainedConfig, seed: int) -> None:
        self._model = meta_model(config, "fp32")
        self._seed = seed
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}
        self._drawn_module: str | None = None
        self._drawn: dict[str, torch.Tensor] = {}

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, region: Region) -> torch.Tensor:
        """The values of ``region``. Raises ``ModelError`` where the family's rules leave part of the parameter unset."""
        module_name, _, parameter_name = name.rpartition(".")
        if module_name != self._drawn_module:
            self._drawn = {}
            self._drawn = draw(self._model, module_name, self._seed)
            self._drawn_module = module_name
        return self._drawn[parameter_name][region.slices]


def draw(model: PreTrainedModel, module_name: str, seed: int) -> dict[str, torch.Tensor]:
    """The parameters of one module (not of its children) by the rules of ``model``'s family, float32 on the CPU.

    ``model`` may be on meta. Raises ``ModelError`` naming a parameter that the rules leave unset.
    """
    module = copy.copy(model.get_submodule(module_name))
    module._parameters = {
        name: nn.Parameter(torch.full(parameter.shape, torch.nan)) if parameter is not None else None
        for name, parameter in module._parameters.items()
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(module_seed(seed, module_name))
        model._init_weights(module)  # type: ignore[no-untyped-call]
    parameters = {name: parameter.detach() for name, parameter in module._parameters.items() if parameter is not None}
    for name, values in parameters.items():
        if values.isnan().any():
            raise ModelError(f"{model.config.model_type}: no rule of initialisation sets {module_name}.{name}")
    return parameters


def module_seed(seed: int, module_name: str) -> int:
    """A seed of 63 bits from the run's seed and a module's name."""
    digest = hashlib.sha256(f"{seed}/{module_name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
