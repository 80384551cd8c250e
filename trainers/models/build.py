"""From a recipe to a transformers configuration, a model without memory for its parameters, and the facts that planning needs.

The configuration comes from the recipe's keys or from a folder's ``config.json``; vocabulary and end of text come from the
dataset. Mistakes that transformers would find late, or not at all, are refused here in plain words. No remote code, ever.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from outgrow.contracts import ModelFacts
from outgrow.errors import ModelError
from outgrow.recipes.placed import weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.data import Data, FolderTokenizer
from outgrow.recipes.schema.model import ArchitectureModel, CustomModel, FolderModel
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.training import Precision
from outgrow.storage import verify_tree
from outgrow.trainers.models.checked import require_checked
from outgrow.trainers.models.custom import custom_config, custom_model, is_custom
from outgrow.trainers.models.experts import give_every_expert_a_gradient
from outgrow.trainers.models.families import attention_implementation, blocks, check_values
from outgrow.trainers.models.grown import most_added_tokens
from outgrow.trainers.models.on_meta import EmptyOnMeta
from outgrow.trainers.models.shapes import shapes_of
from outgrow.trainers.models.weights import read_manifest

__all__ = ["blocks", "config_for", "facts", "meta_model"]

MASTER_DTYPE: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Of the parameters that the optimizer steps, by ``recipe.precision``; bf16 is a copy that the engine computes with."""

REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)
"""What transformers raises for a configuration that it cannot take: what its code runs into, and in version 5 its checks."""

_FROM_DATASET = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "num_local_experts",
    "num_experts_per_tok",
)
_OLDER_ROTARY_KEYS = {"rope_theta", "rope_scaling"}


class Vocabulary(Protocol):
    """What a model is told of the dataset's tokenizer: a ``DatasetCard`` says it, and so does a token store."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...


def config_for(recipe: Recipe, site: Site, card: Vocabulary | None = None) -> PretrainedConfig:
    """The configuration of the recipe's model; without a card, before the data are built, with the vocabulary asked for.

    Raises ``ModelError``: unknown family or key, a value that cannot work, sequences longer than the model's positions, a
    tokenizer that does not belong to the folder's model.
    """
    vocab_size = card.vocab_size if card is not None else _vocab_size(recipe.data, site)
    eos_token_id = card.eos_token_id if card is not None else None
    if isinstance(recipe.model, CustomModel):
        config = custom_config(recipe.model, vocab_size, eos_token_id)
        _check_positions(recipe, config.max_position_embeddings, recipe.model.factory, "the model's max_positions")
        return config
    if isinstance(recipe.model, ArchitectureModel):
        config, where = _from_keys(recipe.model, vocab_size, eos_token_id), "model.config"
    else:
        config, where = (
            _from_folder(recipe.model, site, vocab_size, eos_token_id, most_added_tokens(recipe.data)),
            f"{weights_folder(site, recipe.model.path)}/config.json",
        )
    config = checked_config(config, where)
    _check_positions(recipe, getattr(config, "max_position_embeddings", None), where)
    return config


def _check_positions(recipe: Recipe, positions: int | None, where: str, raised: str = "max_position_embeddings") -> None:
    lengths = {"data.sequence_length": recipe.data.sequence_length} | {
        f"data.stages[{number}].sequence_length": stage.sequence_length or 0 for number, stage in enumerate(recipe.data.stages)
    }
    key = max(lengths, key=lengths.__getitem__)
    if positions is not None and lengths[key] > positions:
        raise ModelError(
            f"{key} is {lengths[key]}, but the model has {positions} positions",
            where=where,
            hint=f"lower {key} to {positions}, or raise {raised}",
        )


def checked_config(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """``config`` as training needs it; ``ModelError`` for values and sizes that cannot work. ``where`` is their origin."""
    check_values(config, where)
    _check_sizes(config, where)
    config.use_cache = False
    return config


def meta_model(config: PretrainedConfig, precision: Precision) -> PreTrainedModel:
    """The model with parameters on meta in the master dtype, and every buffer real on the CPU; in training mode.

    Buffers (rotary frequencies) are in no state dict: they are right from here on and must be kept through any ``to_empty``.
    Raises ``ModelError`` where transformers cannot build the configuration. A custom model comes in a wrapper that has of
    ``PreTrainedModel`` what training uses.
    """
    if is_custom(config):
        return cast(PreTrainedModel, _ready(custom_model(config, MASTER_DTYPE[precision])))
    dtype, attention = MASTER_DTYPE[precision], attention_implementation(config)
    try:
        with EmptyOnMeta(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except REFUSALS as error:
        raise ModelError(f"transformers cannot build this {config.model_type}: {error}", where="model.config") from error
    # Building on meta gave each tied parameter an object of its own.
    model.tie_weights()  # type: ignore[no-untyped-call]
    buffers = dict(model.named_buffers())
    kept = sorted(buffers.keys() & model.state_dict().keys())
    if kept:
        raise ModelError(f"{config.model_type}: has state that is no parameter, which is not supported: {', '.join(kept)}")
    lost = [name for name, buffer in buffers.items() if buffer.is_meta]
    if lost:
        raise ModelError(f"{config.model_type}: buffers without values: {', '.join(lost)}")
    return cast(PreTrainedModel, _ready(model))


def _ready(model: nn.Module) -> nn.Module:
    give_every_expert_a_gradient(model)
    return model.train()


def facts(recipe: Recipe, site: Site, card: Vocabulary | None = None) -> ModelFacts:
    """What planning needs to know of the recipe's model; allocates none of its parameters.

    Raises ``ModelError`` as ``config_for`` does, and for a family that has not passed ``outgrow model check`` on this machine.
    """
    config = config_for(recipe, site, card)
    if not is_custom(config):
        where = str(weights_folder(site, recipe.model.path)) if isinstance(recipe.model, FolderModel) else "model.family"
        require_checked(config.model_type, Path(site.cache).expanduser(), where)
    model = meta_model(config, recipe.precision)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return ModelFacts(
        family=config.model_type if not is_custom(config) else config.outgrow_model["factory"],
        parameters=sum(sizes),
        largest_tensor=max(sizes),
        blocks=len(blocks(model)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        **shapes_of(model, recipe),
    )


def config_class(model_type: str, where: str = "model.family") -> type[PretrainedConfig]:
    """transformers' configuration class of a family that predicts next tokens. Raises ``ModelError`` with the nearest name."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        raise ModelError(
            f"transformers knows no family '{model_type}' that predicts next tokens",
            where=where,
            hint=f"did you mean {near[0]}?" if near else "tested are llama, mistral, qwen3, gemma2, mixtral",
        )
    return type(AutoConfig.for_model(model_type))


def _from_keys(model: ArchitectureModel, vocab_size: int, eos_token_id: int | None) -> PretrainedConfig:
    kind = config_class(model.family)
    _check_keys(kind, model.config)
    try:
        # No padding token: transformers would keep its embedding at zero, and in our vocabulary it is a word like any other.
        return kind(**model.config, vocab_size=vocab_size, eos_token_id=eos_token_id, bos_token_id=None, pad_token_id=None)
    except REFUSALS as error:
        raise ModelError(f"transformers refuses this configuration of {model.family}: {error}", where="model.config") from error


def _check_keys(kind: type[PretrainedConfig], given: Mapping[str, Any]) -> None:
    """Every key is one of the family's own and holds a value of the kind that its default has."""
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
    allowed = set(defaults) | (_OLDER_ROTARY_KEYS if "rope_parameters" in defaults else set())
    problems = []
    for key, value in given.items():
        if key in _FROM_DATASET:
            problems.append(f"{key}: remove it; it comes from the dataset or the trainer")
        elif key not in allowed:
            near = difflib.get_close_matches(key, allowed - set(_FROM_DATASET), n=1)
            problems.append(f"{key}: {kind.model_type} has no such key" + (f"; did you mean {near[0]}?" if near else ""))
        elif not _fits(value, defaults.get(key)):
            problems.append(f"{key}: {value!r} is not like the default, {defaults[key]!r}")
    if problems:
        raise ModelError("\n".join(problems), where="model.config")


def _fits(value: Any, default: Any) -> bool:
    """Whether a value may stand for a default: whole numbers, numbers, switches and words as the default is one."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return value is None or (isinstance(value, int) and not isinstance(value, bool))
    if isinstance(default, float):
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return not isinstance(default, str) or isinstance(value, str)


def _from_folder(
    model: FolderModel, site: Site, vocab_size: int, eos_token_id: int | None, most_added: int
) -> PretrainedConfig:
    folder = weights_folder(site, model.path)
    config = folder_config(folder)
    if vocab_size > config.vocab_size + most_added:
        raise ModelError(
            f"the dataset's tokenizer has {vocab_size} tokens, the model {config.vocab_size}: the tokenizer is not the model's",
            where=str(folder),
            hint=f"use the model's own: data.tokenizer: {{kind: folder, path: {model.path}}}",
        )
    config.vocab_size = max(config.vocab_size, vocab_size)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if None not in (eos_token_id, *ends) and eos_token_id not in ends:
        raise ModelError(
            f"documents of the dataset end with token {eos_token_id}, those of the model with {', '.join(map(str, ends))}",
            where=str(folder),
            hint=f"use the model's own tokenizer: data.tokenizer: {{kind: folder, path: {model.path}}}",
        )
    return config


def folder_config(folder: Path) -> PretrainedConfig:
    """The configuration in a local Hugging Face folder. Raises ``ModelError`` where there is none that transformers knows."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError("there is no such folder", where=str(folder), hint="sources in site.yaml says where a name leads to")
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise ModelError(
            "this is an adapter alone", where=str(folder), hint="outgrow export RUN FOLDER --merged writes the whole model"
        )
    if not path.is_file():
        raise ModelError("no config.json here", where=str(folder), hint="a Hugging Face model folder has one")
    manifest = read_manifest(folder)
    if manifest is not None:
        verify_tree(folder, {path.name: manifest.files[path.name]})
    try:
        model_type = json.loads(path.read_bytes())["model_type"]
        config_class(model_type, str(path))
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*REFUSALS, OSError) as error:
        raise ModelError(f"not a configuration that transformers can read: {error}", where=str(path)) from error
    return config


def _check_sizes(config: PretrainedConfig, where: str) -> None:
    """Raise ``ModelError`` for sizes that are no counts, and for heads and experts that do not divide or fit."""
    for key in _SIZES:
        size = getattr(config, key, None)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ModelError(f"{key} is {size!r}; it must be a whole number from 1", where=where)
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        near = difflib.get_close_matches(str(activation), ACT2FN, n=1)
        raise ModelError(f"hidden_act '{activation}' is unknown", where=where, hint=f"did you mean {near[0]}?" if near else "")
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None)
    experts, chosen = getattr(config, "num_local_experts", None), getattr(config, "num_experts_per_tok", None)
    if head_dim in (None, hidden // heads) and hidden % heads:
        message = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
    elif heads % groups:
        message = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    elif (head_dim or hidden // heads) % 2:
        message = f"a head has {head_dim or hidden // heads} dimensions; rotary positions need an even number"
    elif experts is not None and chosen is not None and chosen > experts:
        message = f"num_experts_per_tok {chosen} is more than num_local_experts {experts}"
    else:
        return
    raise ModelError(message, where=where)


def _vocab_size(data: Data, site: Site) -> int:
    """Tokens that the tokenizer has, or may have at most if it is yet to be trained, with the recipe's tags."""
    tags = {stream.tag for stream in data.streams if stream.tag}
    if not isinstance(data.tokenizer, FolderTokenizer):
        return data.tokenizer.vocab_size + len(tags)
    path = weights_folder(site, data.tokenizer.path) / "tokenizer.json"
    try:
        tokens = json.loads(path.read_bytes())
        ids = dict(tokens["model"]["vocab"]) | {added["content"]: added["id"] for added in tokens["added_tokens"]}
        return int(max(ids.values())) + 1 + len(tags - ids.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"not a tokenizer of tokens with numbers: {error}", where=str(path)) from error
