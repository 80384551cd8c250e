"""Activation checkpointing: what a block computes again in the backward pass instead of keeping it.

``full`` keeps the inputs of a block alone, of every block or of every second, third, ... one. ``selective`` keeps the results
of the operations that are dear to compute, and computes norms, activations and rotations again (Korthikanti et al. 2022).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from outgrow.recipes.schema.speed import ActivationCheckpointing, KeepAll, RecomputeBlocks

_KINDS: Mapping[str, str] = {
    "aten::mm": "matmul",
    "aten::addmm": "matmul",
    "aten::bmm": "matmul",
    "aten::baddbmm": "matmul",
    "aten::_scaled_mm": "matmul",
    "aten::_grouped_mm": "matmul",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention": "attention",
    "aten::_scaled_dot_product_efficient_attention": "attention",
    "aten::_scaled_dot_product_cudnn_attention": "attention",
    "torch_attn::_varlen_attn": "attention",
    "flash_attn::_flash_attn_varlen_forward": "attention",
    "flex_attention": "attention",
}
"""What an operation does, by its name in torch; all others are cheap."""


def checkpoint_activations(blocks: Sequence[nn.Module], policy: ActivationCheckpointing) -> None:
    """Make blocks checkpoint themselves. Their ``forward`` is replaced, not the module, so that parameter names stay.

    To be called before ``fully_shard``: its hooks then gather parameters around the block, not again within it.
    """
    if isinstance(policy, KeepAll):
        return
    if isinstance(policy, RecomputeBlocks):
        chosen, context = blocks[:: policy.every], noop_context_fn
    else:
        chosen, context = blocks, partial(_choose_operations, policy.keep)
    for block in chosen:
        # Nothing in training draws a random number (models/families.py refuses what would): there is no state to keep.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=context, preserve_rng_state=False)


def _choose_operations(keep: Collection[str]) -> Any:
    """The contexts of ``checkpoint`` for one block of one forward pass."""
    return create_selective_checkpoint_contexts(_Choice(keep))  # type: ignore[no-untyped-call]


class _Choice:
    """Says of each operation of a block, in their order, whether its result is kept."""

    def __init__(self, keep: Collection[str]) -> None:
        self._keep = keep
        self._products: Counter[bool] = Counter()

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> bool:
        kind = _kind(operation)
        if kind == "matmul" and "every_second_matmul" in self._keep:
            # Older releases of torch ask again as they recompute: those are counted apart.
            self._products[context.is_recompute] += 1
            return self._products[context.is_recompute] % 2 == 1
        return kind in self._keep


@cache
def _kind(operation: Any) -> str:
    return _KINDS.get(operation.name().partition(".")[0], "")
