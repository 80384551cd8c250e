"""DeepSpeed's own engine around a model on meta: memory for this rank's part alone, then ZeRO over it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from outgrow.contracts import JsonDict
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.optimizer import AdamW
from outgrow.trainers.engines.materialise import materialise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Engine(DeepSpeedEngine):  # type: ignore[misc]
    """Without what suits another way of starting."""

    def _broadcast_model(self) -> None:
        """Parameters have no values yet, and every rank fills its own part from the same source."""

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        """ZeRO's optimizer in bfloat16 at stage 1 too, where DeepSpeed takes another one that keeps its states otherwise."""
        super()._do_optimizer_sanity_check(basic_optimizer)
        return "zero_optimization"


def start_deepspeed(model: PreTrainedModel, recipe: Recipe, config: JsonDict, device: torch.device) -> Any:
    """The engine whose ``optimizer`` is ZeRO's. ``model``'s parameters are uninitialised, at stage 3 cut into shards."""
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    then = _cutter(config) if config["zero_optimization"]["stage"] == 3 else None
    materialise(model, device, torch.bfloat16 if recipe.precision == "bf16" else None, then=then)
    return _Engine(
        args=None,
        model=model,
        optimizer=_adamw(model, recipe, matrices),
        config=config,
        config_class=DeepSpeedConfig(config),
        dont_change_device=True,
    )


def _adamw(model: nn.Module, recipe: Recipe, matrices: Collection[str]) -> torch.optim.AdamW:
    settings = recipe.optimizer
    assert isinstance(settings, AdamW)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name in matrices], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in trained.items() if name not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=settings.betas, eps=settings.eps, fused=True
    )


def _cutter(config: JsonDict) -> Callable[[Any], None]:
    """What cuts a parameter into shards and frees the rest, so that no rank holds more than one whole parameter."""
    # Given a module without parameters it cuts nothing yet; but linear layers now free what was gathered for them, in the whole
    # process and for good.
    init = Init(module=nn.Module(), config_dict_or_path=config)
    if init.param_swapper is not None:
        _read_each_once(init.param_swapper)

    def cut(parameter: Any) -> None:
        # What `Init` does, but for a broadcast of values that are not there yet.
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return cut


def _read_each_once(swapper: Any) -> None:
    """Where the end of the forward pass is near, DeepSpeed lists a parameter for it and for the backward pass, and fails."""
    swap_in = swapper.swap_in
    swapper.swap_in = lambda parameters, **how: swap_in(list({p.ds_id: p for p in parameters}.values()), **how)
