"""Names and shapes of a model's parameters as a plan needs them: what lies in which block, what an adapter would touch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.trainers.adapters.targets import choose
from outgrow.trainers.models.experts import expert_share, mixtures
from outgrow.trainers.models.families import attention_implementation, blocks, layer_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shapes_of(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """The fields of ``ModelFacts`` that are of single parameters, and of attention; ``model`` may lie on meta.

    Raises ``ModelError`` where the patterns of the recipe's adapter choose nothing.
    """
    config, names = model.config, {id(module): name for name, module in model.named_modules()}
    own = blocks(model)
    linear = [f"{names[id(module)]}.weight" for block in own for module in block.modules() if isinstance(module, nn.Linear)]
    adapted, whole = _chosen(model, recipe)
    transformers_own = getattr(config, "num_attention_heads", None) is not None
    return {
        "shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "block_names": tuple(names[id(block)] for block in own),
        "linear": tuple(linear),
        "adapted": adapted,
        "whole": whole,
        "heads": getattr(config, "num_attention_heads", None) or 0,
        "eager_attention": transformers_own and attention_implementation(config) == "eager",
        "mask_kinds": len(layer_windows(config)) if transformers_own else 0,
        "has_mixtures": bool(mixtures(model)),
        "expert_share": expert_share(config),
    }


def _chosen(model: PreTrainedModel, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Weights that get an adapter, and parameters that are trained beside it."""
    if not isinstance(recipe.adapter, Lora):
        return (), ()
    chosen = choose(model, recipe.adapter)
    whole = {id(parameter) for name in chosen.whole for parameter in model.get_submodule(name).parameters()}
    return (
        tuple(f"{name}.weight" for name in chosen.adapted),
        tuple(name for name, parameter in model.named_parameters() if id(parameter) in whole),
    )
