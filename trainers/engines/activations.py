"""Activation checkpointing: what a block computes again in the backward pass instead of keeping it.

``full`` keeps the block's inputs alone. ``selective`` keeps the results of matrix products and attention, which are dear
to compute, and computes norms, activations and rotations again (Korthikanti et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from outgrow.recipes.schema.speed import ActivationCheckpointing

_aten = torch.ops.aten
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_activations(blocks: Sequence[nn.Module], policy: ActivationCheckpointing) -> None:
    """Make each block checkpoint itself. Its ``forward`` is replaced, not the module, so that parameter names stay.

    To be called before ``fully_shard``: its hooks then gather parameters around the block, not again within it.
    """
    if policy.kind == "none":
        return
    context = noop_context_fn if policy.kind == "full" else partial(create_selective_checkpoint_contexts, _KEPT)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=context)
