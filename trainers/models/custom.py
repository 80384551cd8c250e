"""Models of the user's own (``model: {kind: custom}``): a factory's module, held to what docs/custom.md asks of it.

The module is wrapped, so that engines, weights from the seed, checkpoints and the plan see in it what they see in a model of
transformers: a configuration with sizes, a rule of initialisation, one way to be called. As all models, it is built on meta.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from outgrow.errors import ModelError
from outgrow.recipes.schema.model import CustomModel
from outgrow.trainers.models.on_meta import parameters_on_meta

KIND = "custom"
"""``model_type`` of the configuration of such a model."""
PREFIX = "module."
"""What the wrapper puts before the factory's own names of parameters."""
WHERE = "model.factory"
_CONTRACT = "docs/custom.md lists what the model must have"


class CustomLanguageModel(nn.Module):
    """A factory's module as engines take it; its parameters are ``module.<the factory's name>``."""

    def __init__(self, module: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.module = module
        self.config = config

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated modules in order."""
        return list(self.module.blocks)  # type: ignore[arg-type]

    def forward(self, input_ids: torch.Tensor, segments: torch.Tensor, position_ids: torch.Tensor) -> CausalLMOutput:
        """Scores [n, L, vocabulary] as ``logits``; arguments as in ``Batch``. ``ModelError`` where the module gives others."""
        scores = self.module(input_ids, segments, position_ids)
        wanted = (*input_ids.shape, self.config.vocab_size)
        if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != wanted:
            given = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ModelError(f"its forward returned {given}; it must be one tensor of scores, {list(wanted)}", where=WHERE)
        return CausalLMOutput(logits=scores)  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        """As PyTorch does it: what a layer's ``reset_parameters`` draws, then what the model's ``init_weights`` makes of it."""
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        if callable(init := getattr(self.module, "init_weights", None)):
            init(module)


def custom_config(model: CustomModel, vocab_size: int, eos_token_id: int | None) -> PretrainedConfig:
    """The sizes of the model that the factory makes for ``vocab_size``, built once on meta to read them.

    Raises ``ModelError`` for a factory that cannot be imported or called, and for a module that lacks what training needs.
    """
    config = PretrainedConfig(vocab_size=vocab_size, eos_token_id=eos_token_id)
    config.model_type = KIND
    config.outgrow_model = model.model_dump(mode="json")
    module = _built(config, torch.float32)
    config.hidden_size = _hidden_size(module)
    config.num_hidden_layers = len(list(module.blocks))  # type: ignore[arg-type]
    config.max_position_embeddings = module.max_positions
    config.attention_width = getattr(module, "attention_width", 0)
    distinct = len(list(module.parameters()))
    config.tie_word_embeddings = distinct < len(list(module.named_parameters(remove_duplicate=False)))
    return config


def is_custom(config: PretrainedConfig) -> bool:
    """Whether ``config`` is of ``custom_config``."""
    return bool(config.model_type == KIND)


def custom_model(config: PretrainedConfig, dtype: torch.dtype) -> CustomLanguageModel:
    """The factory's module in its wrapper, parameters on meta in ``dtype``, buffers real on the CPU."""
    return CustomLanguageModel(_built(config, dtype), config)


def looked_up(model: nn.Module) -> int:
    """Parameters that a token only looks up: those of embeddings that no other module shares."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(table.numel() for table in tables if owners[id(table)] == 1)


def _built(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """What the factory returns, checked. Layers are made in ``dtype``, which is torch's default meanwhile."""
    chosen: Mapping[str, Any] = config.outgrow_model
    name, options = chosen["factory"], chosen["options"]
    try:
        factory = resolve_name(name)
    except Exception as error:  # as it is imported foreign code runs, and may not even be Python
        raise ModelError(
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            where=WHERE,
            hint="the module must be importable on every node: install it there (pip install FOLDER); on this machine alone, "
            "PYTHONPATH=FOLDER before the command will do. Else check its name",
        ) from error
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parameters_on_meta():
            module = factory(vocab_size=config.vocab_size, **options)
    except Exception as error:  # foreign code: whatever it raises is the answer
        raise ModelError(
            f"{name}(vocab_size={config.vocab_size}, **options) raised {type(error).__name__}: {error}", where=WHERE
        ) from error
    finally:
        torch.set_default_dtype(before)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} returned {type(module).__name__}; it must be a torch.nn.Module", where=WHERE, hint=_CONTRACT)
    problems = list(_problems(module))
    if problems:
        raise ModelError("\n".join([f"the model of {name} cannot be trained", *problems]), where=WHERE, hint=_CONTRACT)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _problems(module: nn.Module) -> Iterator[str]:
    """Everything that training needs and ``module`` lacks, a sentence each."""
    yield from _shape_problems(module)
    parameters = dict(module.named_parameters())
    if not parameters:
        yield "it has no parameters"
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            yield f"parameter {name} has requires_grad False; all must be trained: make it a buffer with persistent=False"
        elif not parameter.is_floating_point():
            yield f"parameter {name} is {parameter.dtype}; it must be of floats"
    buffers = dict(module.named_buffers())
    for name in sorted(buffers.keys() & module.state_dict().keys()):
        yield f"buffer {name} is in the state dict; register it with persistent=False, and compute it when the model is made"
    for name in sorted(name for name, buffer in buffers.items() if buffer.is_meta):
        yield f"buffer {name} has no values: make it by other means than torch.empty"
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            yield f"{name} is a dropout of {part.p}, which would make the loss depend on the number of ranks; set it to 0"


def _shape_problems(module: nn.Module) -> Iterator[str]:
    blocks, inside = getattr(module, "blocks", None), {id(part) for part in module.modules()}
    if not isinstance(blocks, nn.ModuleList | Sequence):
        yield "attribute 'blocks' is missing: the list of its repeated modules"
    elif not len(blocks):
        yield "attribute 'blocks' is empty: it must have the repeated modules in it, one at least"
    elif not all(isinstance(block, nn.Module) and id(block) in inside for block in blocks):
        yield "attribute 'blocks' has members that are no modules of the model"
    elif len({id(block) for block in blocks}) < len(blocks):
        yield "attribute 'blocks' has a module twice"
    positions = getattr(module, "max_positions", None)
    if not isinstance(positions, int) or positions < 1:
        yield "attribute 'max_positions' is missing: the longest row that it can compute, in tokens"
    try:
        inspect.signature(module.forward).bind("token_ids", "segments", "positions")
    except (TypeError, ValueError):
        yield "its forward does not take (token_ids, segments, positions)"
    if not isinstance(getattr(module, "attention_width", 0), int):
        yield "attribute 'attention_width' is no whole number: heads x width of a head"
    tables = any(isinstance(part, nn.Embedding) for part in module.modules())
    if not tables and not isinstance(getattr(module, "hidden_size", None), int):
        yield "attribute 'hidden_size' is missing, and there is no nn.Embedding to read it from"


def _hidden_size(module: nn.Module) -> int:
    """The attribute ``hidden_size``, or the width of the embedding with the most rows."""
    given = getattr(module, "hidden_size", None)
    if isinstance(given, int):
        return given
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings).embedding_dim
