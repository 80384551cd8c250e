"""What does not go together: every pair of choices in a recipe that no engine can honour, each with the nearest that works.

Pure: asked by ``plan`` before anything is read, and by the worker before it makes an engine. ``METHODS`` and ``ENGINES`` span
the matrix that docs/engines.md prints and that the tests of parity go through cell by cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outgrow.contracts import Refusal
from outgrow.errors import PlanError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.model import CustomModel, FolderModel
from outgrow.recipes.schema.optimizer import AdamW8bit, Muon
from outgrow.recipes.schema.parallel import Fsdp2, Zero
from outgrow.recipes.schema.speed import ChunkedLogits, LigerLoss, RecomputeBlocks, RecomputeCheap

METHODS: Mapping[str, dict[str, Any]] = {
    "full": {"kind": "none"},
    "LoRA": {"kind": "lora"},
    "rsLoRA": {"kind": "lora", "scaling": "rslora"},
    "DoRA": {"kind": "lora", "dora": True},
    "QLoRA": {"kind": "lora", "base": "nf4"},
}
"""``adapter`` of each method by the name that people call it."""

ENGINES: Mapping[str, dict[str, Any]] = {
    "plain": {"kind": "auto"},
    "DDP": {"kind": "ddp"},
    "FSDP2": {"kind": "fsdp2"},
    "HSDP": {"kind": "fsdp2", "shard": 2},
    "FSDP2, CPU offload": {"kind": "fsdp2", "offload": "cpu"},
    "ZeRO-1": {"kind": "zero", "stage": 1},
    "ZeRO-2": {"kind": "zero", "stage": 2},
    "ZeRO-3": {"kind": "zero", "stage": 3},
    "ZeRO-3, CPU offload": {"kind": "zero", "stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "ZeRO-3, NVMe offload": {"kind": "zero", "stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
}
"""``parallel`` of each engine by the name that people call it."""


@dataclass(frozen=True)
class Rule:
    """A choice that cannot be had: ``broken`` says of a recipe on a device whether it was made.

    ``nearest`` are overrides as the command line takes them, apart by `` or `` where any one of them will do.
    """

    asked: str
    why: str
    nearest: str
    broken: Callable[[Recipe, str], bool]


def _zero(recipe: Recipe) -> Zero | None:
    return recipe.parallel if isinstance(recipe.parallel, Zero) else None


def _stage_3(recipe: Recipe) -> bool:
    return isinstance(recipe.parallel, Zero) and recipe.parallel.stage == 3


def _nf4(recipe: Recipe) -> bool:
    return isinstance(recipe.adapter, Lora) and recipe.adapter.base == "nf4"


def _offloads_fsdp2(recipe: Recipe) -> bool:
    return isinstance(recipe.parallel, Fsdp2) and recipe.parallel.offload == "cpu"


RULES: tuple[Rule, ...] = (
    Rule(
        "precision fp64 with parallel.kind zero",
        "DeepSpeed keeps its own state in float32",
        "precision=fp32 or parallel=fsdp2",
        lambda recipe, device: bool(_zero(recipe)) and recipe.precision == "fp64",
    ),
    Rule(
        "adapter.base nf4 with precision fp64",
        "bitsandbytes computes in float32 at most",
        "precision=bf16 or precision=fp32",
        lambda recipe, device: _nf4(recipe) and recipe.precision == "fp64",
    ),
    Rule(
        "adapter.base nf4 without weights to quantise",
        "the model is made from nothing, so frozen 4-bit layers would stay random",
        "model='{kind: folder, path: FOLDER}' or adapter=none",
        lambda recipe, device: _nf4(recipe) and not isinstance(recipe.model, FolderModel),
    ),
    Rule(
        "optimizer muon with parallel.kind zero",
        "ZeRO cuts matrices into flat pieces, and Muon needs whole ones",
        "parallel=fsdp2 or optimizer.kind=adamw",
        lambda recipe, device: bool(_zero(recipe)) and isinstance(recipe.optimizer, Muon),
    ),
    Rule(
        "optimizer adamw_8bit with parallel.kind zero",
        "DeepSpeed steps by an AdamW of its own, in float32",
        "parallel=fsdp2 or optimizer.kind=adamw",
        lambda recipe, device: bool(_zero(recipe)) and isinstance(recipe.optimizer, AdamW8bit),
    ),
    Rule(
        "optimizer muon or adamw_8bit with parallel.offload cpu",
        "their steps are many small products, slow on a CPU while the device waits",
        "optimizer.kind=adamw or parallel.offload=none",
        lambda recipe, device: _offloads_fsdp2(recipe) and isinstance(recipe.optimizer, Muon | AdamW8bit),
    ),
    Rule(
        "cross_entropy.kind liger on a CPU",
        "Liger's kernels are Triton's, for GPUs",
        "cross_entropy=chunked",
        lambda recipe, device: isinstance(recipe.cross_entropy, LigerLoss) and device != "cuda",
    ),
    Rule(
        "attention varlen or flash_attention_2 on a CPU",
        "their kernels are for GPUs",
        "attention=auto",
        lambda recipe, device: recipe.attention in ("varlen", "flash_attention_2") and device != "cuda",
    ),
    Rule(
        "attention varlen, flex or flash_attention_2 in precision fp64",
        "their kernels do not compute in float64",
        "attention=sdpa",
        lambda recipe, device: recipe.attention in ("varlen", "flex", "flash_attention_2") and recipe.precision == "fp64",
    ),
    Rule(
        "attention varlen or flash_attention_2 in precision fp32",
        "their kernels compute in 16 bits",
        "precision=bf16 or attention=sdpa",
        lambda recipe, device: recipe.attention in ("varlen", "flash_attention_2") and recipe.precision == "fp32",
    ),
    Rule(
        "attention flex on a CPU",
        "flex_attention has no backward pass there",
        "attention=auto",
        lambda recipe, device: recipe.attention == "flex" and device != "cuda",
    ),
    Rule(
        "activation_offload with activation_checkpointing selective",
        "the results that are kept are not handed to what offloads",
        "activation_checkpointing=full or activation_checkpointing=none",
        lambda recipe, device: recipe.activation_offload and isinstance(recipe.activation_checkpointing, RecomputeCheap),
    ),
    Rule(
        "activation_offload on a CPU",
        "activations are in the node's memory already",
        "activation_offload=false",
        lambda recipe, device: recipe.activation_offload and device != "cuda",
    ),
    Rule(
        "an adapter on model.kind custom",
        "peft's rules of targets are for transformers' models",
        "adapter=none",
        lambda recipe, device: isinstance(recipe.adapter, Lora) and isinstance(recipe.model, CustomModel),
    ),
    Rule(
        "attention with model.kind custom",
        "the model computes its attention by itself",
        "attention=auto",
        lambda recipe, device: isinstance(recipe.model, CustomModel) and recipe.attention != "auto",
    ),
    Rule(
        "cross_entropy chunked or liger with model.kind custom",
        "the model gives scores, not the hidden states before them",
        "cross_entropy=whole",
        lambda recipe, device: (
            isinstance(recipe.model, CustomModel) and isinstance(recipe.cross_entropy, ChunkedLogits | LigerLoss)
        ),
    ),
    Rule(
        "activation_checkpointing selective with parallel.stage 3",
        "DeepSpeed gathers parameters within a block, and the choice of operations would take its copies for the block's own",
        "activation_checkpointing=full or parallel=fsdp2",
        lambda recipe, device: _stage_3(recipe) and isinstance(recipe.activation_checkpointing, RecomputeCheap),
    ),
    Rule(
        "adapter.dora and activation_checkpointing with parallel.stage 3",
        "DoRA looks at matrices of other layers, which DeepSpeed gathers in the forward pass but not where that is done again",
        "activation_checkpointing=none or parallel=fsdp2",
        lambda recipe, device: (
            _stage_3(recipe)
            and isinstance(recipe.adapter, Lora)
            and recipe.adapter.dora
            and isinstance(recipe.activation_checkpointing, RecomputeBlocks)
        ),
    ),
    Rule(
        "compile blocks with parallel.stage 3",
        "DeepSpeed gathers parameters layer by layer within a block, so there is no whole block to compile",
        "compile=none or parallel=fsdp2",
        lambda recipe, device: _stage_3(recipe) and recipe.compile == "blocks",
    ),
)


EXPERTS = Rule(
    "a mixture of experts with parallel.stage 1 or 2 on several ranks",
    "DeepSpeed adds gradients up in the order in which they come, which is another on a rank where no token chose an expert",
    "parallel.stage=3 or parallel=fsdp2",
    lambda recipe, device: (zero := _zero(recipe)) is not None and zero.stage < 3,
)
"""The rule that holds where ``shares_experts``: it depends on the model and on the ranks as well."""


def refusals(recipe: Recipe, device: str, *, shares_experts: bool = False) -> list[Refusal]:
    """Every rule that ``recipe`` breaks on ``device`` (``cpu`` or ``cuda``).

    ``shares_experts``: its model is a mixture of experts, and there is more than one rank.
    """
    rules = (*RULES, EXPERTS) if shares_experts else RULES
    return [
        Refusal(asked=rule.asked, available=rule.why, nearest=rule.nearest) for rule in rules if rule.broken(recipe, device)
    ]


def require(recipe: Recipe, device: str, *, shares_experts: bool = False) -> None:
    """Nothing where ``recipe`` can be honoured on ``device``. Raises ``PlanError`` with every rule that it breaks."""
    found = refusals(recipe, device, shares_experts=shares_experts)
    if found:
        raise PlanError(
            "; ".join(f"{refusal.asked}: {refusal.available}" for refusal in found),
            hint="; and ".join(refusal.nearest for refusal in found),
        )
