"""What outgrow knows of each model family: which are tested, where their blocks are, how their attention is masked.

Five families are proven by tests. Another one is refused until ``outgrow model check`` has passed the same probes on it
(``checked.py`` remembers that); what it needs is then worked out from its configuration by the rules here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig

from outgrow.errors import ModelError
from outgrow.trainers.models.custom import CustomLanguageModel

ALL_LAYERS = "all"
"""The one key of ``layer_windows`` where every layer has the same mask."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type`` of transformers.

    ``blocks`` is the dotted path of the list of transformer blocks; ``windows`` gives, for each kind of layer of a
    configuration, how many tokens a query sees (None: all before it). A model with several kinds takes one mask for each.
    ``before`` is the major version of transformers from which on the family is not tested, None where there is none.
    """

    model_type: str
    blocks: str
    windows: Callable[[PretrainedConfig], dict[str, int | None]]
    before: int | None = None


def _no_window(config: PretrainedConfig) -> dict[str, int | None]:
    return {ALL_LAYERS: None}


def _same_window(config: PretrainedConfig) -> dict[str, int | None]:
    return {ALL_LAYERS: getattr(config, "sliding_window", None)}


def _window_by_layer_type(config: PretrainedConfig) -> dict[str, int | None]:
    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    unknown = sorted(set(config.layer_types) - set(windows))
    if unknown:
        raise ModelError(
            f"layers of type {', '.join(unknown)} are not supported; known are {', '.join(windows)}",
            where="model.config.layer_types",
        )
    return {kind: windows[kind] for kind in sorted(set(config.layer_types))}


TESTED: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", blocks="model.layers", windows=_no_window),
        Family(model_type="mistral", blocks="model.layers", windows=_same_window),
        Family(model_type="qwen3", blocks="model.layers", windows=_window_by_layer_type),
        Family(model_type="gemma2", blocks="model.layers", windows=_window_by_layer_type),
        # transformers 5 joins the experts' matrices in memory, so that parameters have other names than in files.
        Family(model_type="mixtral", blocks="model.layers", windows=_same_window, before=5),
    )
    if family.before is None or int(transformers.__version__.partition(".")[0]) < family.before
}


def layer_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Tokens that a query sees, itself included, by kind of layer; None: all before it. ``ALL_LAYERS``: the only kind."""
    family = TESTED.get(config.model_type)
    if family is not None:
        return family.windows(config)
    return _window_by_layer_type(config) if getattr(config, "layer_types", None) else _same_window(config)


def attention_implementation(config: PretrainedConfig) -> str:
    """``sdpa``, or ``eager`` where attention logits are soft-capped: transformers' sdpa leaves the cap out without a word."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order: what FSDP2 shards and activation checkpointing wraps one by one.

    Of a family that is not tested it is the only list of ``num_hidden_layers`` modules; ``ModelError`` where that is in doubt.
    """
    if isinstance(model, CustomLanguageModel):
        return model.blocks
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    family = TESTED.get(config.model_type)
    if family is not None:
        return list(model.get_submodule(family.blocks).children())
    depth = config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise ModelError(
            f"{config.model_type}: {len(lists)} lists of {depth} blocks, so which one are the transformer blocks is in doubt"
        )
    return list(lists[0])


def embedding_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The token embedding and the head, where no other module shares weights of theirs; else two None.

    Of a custom model neither is known, nor the head of a family that does not name it.
    """
    if isinstance(model, CustomLanguageModel):
        return None, None
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None, None
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if any(holders[id(parameter)] > 1 for module in (embedding, head) for parameter in module.parameters()):
        return None, None
    return embedding, head


def names_in_blocks(model: nn.Module) -> set[str]:
    """The names of all parameters that lie within transformer blocks."""
    inside = {id(parameter) for block in blocks(model) for parameter in block.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


@dataclass(frozen=True)
class _OnlyValue:
    """The one value (or None) that a key of a configuration may have, and why."""

    value: Any
    reason: str


_RANDOM = "it draws random numbers, which would make the loss depend on the number of ranks"
_ONLY_VALUES: Mapping[str, _OnlyValue] = {
    "output_router_logits": _OnlyValue(False, "the router's auxiliary loss is not part of the objective"),
    "output_attentions": _OnlyValue(False, "attention maps are not kept in training"),
    "output_hidden_states": _OnlyValue(False, "hidden states are not kept in training"),
    "router_jitter_noise": _OnlyValue(0.0, _RANDOM),
    "pretraining_tp": _OnlyValue(1, "slicing one matrix product over ranks of a past run is not supported"),
    "use_bidirectional_attention": _OnlyValue(False, "next-token prediction needs causal attention"),
    "quantization_config": _OnlyValue(
        None, "quantised weights cannot be trained; take the folder of the original ones, which adapter.base: nf4 quantises"
    ),
}


def check_values(config: PretrainedConfig, where: str) -> None:
    """Raise ``ModelError`` for every key whose value training cannot honour, all at once; ``where`` is a file or a key path."""
    problems = []
    for key, value in config.to_dict().items():
        rule = _ONLY_VALUES.get(key)
        if rule is None and (key.endswith(("dropout", "_pdrop")) and not key.startswith("classifier")):
            rule = _OnlyValue(0.0, _RANDOM)
        if rule is not None and value is not None and value != rule.value:
            problems.append(f"{key} is {value!r}; only {rule.value!r} is supported: {rule.reason}")
    if problems:
        raise ModelError("\n".join(problems), where=where)
