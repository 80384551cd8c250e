"""A small configuration of any family, with every feature of the family switched on: what the probes and the tests run on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from outgrow.errors import ModelError
from outgrow.trainers.models.build import REFUSALS, checked_config, config_class

VOCABULARY = 96
POSITIONS = 64
WINDOW = 5

_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": None,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": POSITIONS,
}
"""Sizes differ where a mix-up would hide; the soft cap is low enough to matter, the window shorter than a document."""


def tiny_config(model_type: str, keys: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A configuration of ``model_type`` with a recipe's ``keys``, but small sizes. Raises ``ModelError`` for bad keys."""
    kind = config_class(model_type)
    known = inspect.signature(kind).parameters
    sizes = {key: size for key, size in _SIZES.items() if key in known}
    try:
        config = kind(
            **{**(keys or {}), **sizes, "vocab_size": VOCABULARY, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
        )
    except REFUSALS as error:
        raise ModelError(f"transformers refuses a small {model_type}: {error}") from error
    return checked_config(config, "model.config")
