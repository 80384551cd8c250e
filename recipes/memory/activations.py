"""What one micro-batch leaves on a device for its backward pass: activations, attention's masks, the scores of the vocabulary.

Bytes a token of a block follow the counting of Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer
Models, section 4.1), done over for what transformers' blocks keep: norms computed in float32, a gated MLP, grouped queries.
Linear layers are read off the shapes, so other blocks count by the same rules. A compiled block keeps less than is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

from outgrow.contracts import ModelFacts
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.speed import ActivationCheckpointing, ChunkedLogits, KeepAll, LigerLoss, RecomputeBlocks
from outgrow.recipes.schema.training import Precision

COMPUTE_BYTES: Mapping[Precision, int] = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of a number that is computed with."""
MASTER_BYTES: Mapping[Precision, int] = {"bf16": 4, "fp32": 4, "fp64": 8}
"""Bytes of a number that the optimizer steps, of its gradient, and of each of AdamW's moments."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on the device: ``kept`` from the forward pass until each block's backward pass (``offloaded``: those of them that
    lie in the node's memory instead); ``working`` while one block's backward pass runs; ``scores`` at the end of the forward
    pass, when no block works."""

    kept: float
    offloaded: float
    working: float
    scores: float


def activations(recipe: Recipe, facts: ModelFacts, rows: int, device: str) -> Activations:
    """What ``rows`` rows of the longest length take at once."""
    length = max(recipe.data.sequence_length, *recipe.data.sequence_lengths)
    tokens, compute = rows * length, COMPUTE_BYTES[recipe.precision]
    widths = _Widths.of(facts)
    masked = _has_mask(recipe, facts, device)
    whole = tokens * widths.kept(compute, repeats_keys=masked)
    if facts.eager_attention or recipe.attention == "eager":
        # The softmax in float32 and its result in the precision of the products, for each pair of tokens.
        whole += rows * facts.heads * length**2 * (4 + compute)
    block = round(tokens * _kept_of_block(recipe.activation_checkpointing, widths, compute, whole / tokens))
    blocks = _recomputed_blocks(recipe.activation_checkpointing, facts.blocks)
    kept = blocks * block + (facts.blocks - blocks) * whole
    on_device = min(2, facts.blocks) * (kept // max(1, facts.blocks)) if recipe.activation_offload else kept
    masks = rows * length**2 * facts.mask_kinds * (1 + compute) if masked else 0
    return Activations(
        kept=on_device + masks + 2 * tokens * facts.hidden_size * compute,
        offloaded=kept - on_device,
        # The block as if it had kept everything, and gradients of the widest layer's result and input.
        working=whole + 2 * tokens * widths.widest * compute,
        scores=_scores(recipe, facts, tokens),
    )


@dataclass(frozen=True)
class _Widths:
    """Numbers a token in one block: of its hidden state, of all linear layers' results, of the inputs of those that lead back
    to the hidden state, and of the widest result."""

    hidden: int
    results: float
    inner: float
    widest: int

    @classmethod
    def of(cls, facts: ModelFacts) -> _Widths:
        hidden, shapes = facts.hidden_size, _linear_of_a_block(facts)
        share = {name: facts.expert_share if ".experts." in name else 1.0 for name in shapes}
        square = any(shape == (hidden, hidden) for shape in shapes.values())
        inner = sum(share[name] * n for name, (m, n) in shapes.items() if m == hidden != n)
        return cls(
            hidden=hidden,
            results=sum(share[name] * m for name, (m, _) in shapes.items()),
            inner=inner + (hidden if square else 0),
            widest=max((m for m, _ in shapes.values()), default=hidden),
        )

    def kept(self, compute: int, *, repeats_keys: bool) -> float:
        """Bytes a token that a block keeps without checkpointing.

        Two norms: their input in float32, and twice in the precision of the products. The products that lead away from the
        hidden state; what attention and the MLP's activation make of them; the inputs of the products that lead back.
        """
        away = self.results - 2 * self.hidden
        repeated = 2 * self.hidden if repeats_keys else 0
        return 8 * self.hidden + compute * (4 * self.hidden + away + 2 * self.inner + repeated)


def _linear_of_a_block(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """Shapes of the linear layers of the block that has most of them."""
    of_blocks = [
        {name: facts.shapes[name] for name in facts.linear if name.startswith(f"{block}.")} for block in facts.block_names
    ]
    largest = max(of_blocks, key=lambda shapes: sum(m * n for m, n in shapes.values()), default={})
    return {name: (shape[0], shape[1]) for name, shape in largest.items()}


def _recomputed_blocks(policy: ActivationCheckpointing, blocks: int) -> int:
    return 0 if isinstance(policy, KeepAll) else ceil(blocks / policy.every) if isinstance(policy, RecomputeBlocks) else blocks


def _kept_of_block(policy: ActivationCheckpointing, widths: _Widths, compute: int, whole: float) -> float:
    """Bytes a token of a block that computes something again: its input, and the results that ``keep`` names."""
    if isinstance(policy, KeepAll):
        return whole
    kept = float(widths.hidden)
    if not isinstance(policy, RecomputeBlocks):
        kept += widths.results if "matmul" in policy.keep else 0
        kept += widths.results / 2 if "every_second_matmul" in policy.keep else 0
        kept += widths.hidden if "attention" in policy.keep else 0
    return min(whole, kept * compute)


def _has_mask(recipe: Recipe, facts: ModelFacts, device: str) -> bool:
    """Whether a mask of L x L numbers is made for each row; kernels for packed rows need none."""
    if recipe.attention == "auto":
        return facts.eager_attention or device != "cuda" or recipe.precision != "bf16"
    return recipe.attention in ("sdpa", "eager")


def _scores(recipe: Recipe, facts: ModelFacts, tokens: int) -> int:
    """The scores of the vocabulary in float32, their logarithms and a gradient; of a chunk of tokens where they come in chunks,
    and then beside the gradient of all hidden states."""
    exact = MASTER_BYTES[recipe.precision]
    loss = recipe.cross_entropy
    if isinstance(loss, ChunkedLogits):
        chunk = min(tokens, loss.tokens)
    elif isinstance(loss, LigerLoss):
        chunk = ceil(tokens / ceil(facts.vocab_size / facts.hidden_size))  # its rule: a chunk as large as the hidden states
    else:
        return 3 * exact * tokens * facts.vocab_size
    hidden = tokens * facts.hidden_size * COMPUTE_BYTES[recipe.precision]
    return 3 * exact * chunk * facts.vocab_size + hidden
