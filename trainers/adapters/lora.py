"""LoRA, rsLoRA and DoRA put into a model that lies on meta, by peft's own layers.

Nothing is drawn and nothing is allocated here: what the matrices begin with is a matter of ``sources``. No dropout: it would
make the loss depend on the ranks. What is trained is kept in the master dtype of the run, what is frozen in the dtype that
computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.training import Precision
from outgrow.torchvision import ensure_importable
from outgrow.trainers.adapters.targets import Chosen, choose
from outgrow.trainers.models.build import MASTER_DTYPE

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"
"""peft's own name for the only adapter of a model; part of its parameters' names."""

COMPUTE_DTYPE: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Of frozen weights, by ``recipe.precision``: no optimizer steps them, so they need no master."""


def adapt(model: PreTrainedModel, recipe: Recipe) -> None:
    """Put the recipe's adapter into ``model``, whose parameters lie on meta, in place; nothing to do for ``adapter: none``.

    Afterwards ``requires_grad`` says what is trained, and a linear layer ``X`` with an adapter has the parameters
    ``X.base_layer.weight``, ``X.lora_A.default.weight``, ``X.lora_B.default.weight`` and, for DoRA,
    ``X.lora_magnitude_vector.default.weight``. Raises ``ModelError`` for patterns that match nothing.
    """
    adapter = recipe.adapter
    if not isinstance(adapter, Lora):
        return
    chosen = choose(model, adapter)
    _inject(model, adapter, chosen)
    _freeze(model, chosen)
    _set_dtypes(model, recipe.precision)
    if adapter.base == "nf4":
        from outgrow.trainers.adapters.nf4 import swap_linears

        adapted = set(chosen.adapted)
        names = [f"{name}.base_layer" if name in adapted else name for name in chosen.linear]
        swap_linears(model, names, COMPUTE_DTYPE[recipe.precision])


def peft_config(adapter: Lora, targets: list[str], whole: list[str] | None = None) -> LoraConfig:
    """peft's configuration of ``adapter`` on the modules ``targets``, with ``whole`` as copies that are trained."""
    ensure_importable()
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft says int and computes with any number
        lora_dropout=0.0,
        use_rslora=adapter.scaling == "rslora",
        use_dora=adapter.dora,
        target_modules=targets,
        modules_to_save=whole,
    )


def scaling(adapter: Lora) -> float:
    """What ``B A`` is multiplied with."""
    return adapter.alpha / (adapter.rank**0.5 if adapter.scaling == "rslora" else adapter.rank)


def _inject(model: PreTrainedModel, adapter: Lora, chosen: Chosen) -> None:
    config = peft_config(adapter, list(chosen.adapted))
    from peft import inject_adapter_in_model

    config.init_lora_weights = False
    inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)


def _freeze(model: PreTrainedModel, chosen: Chosen) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name
    for name in chosen.whole:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad = True


def _set_dtypes(model: PreTrainedModel, precision: Precision) -> None:
    """Replace each parameter by one of the dtype it is kept in; ties stay ties."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                dtype = MASTER_DTYPE[precision] if parameter.requires_grad else COMPUTE_DTYPE[precision]
                memory = torch.empty(parameter.shape, dtype=dtype, device="meta")
                made[parameter] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
