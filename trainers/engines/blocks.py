"""What is done to each transformer block before an engine shards or wraps it: what it keeps for the backward pass, compiling.

Blocks are changed by replacing ``forward`` on the instance, never the module, so that parameter names stay and hooks of
engines (FSDP2's, DeepSpeed's) stay outside: they gather parameters around the compiled or recomputed block, not within it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from outgrow.errors import PlanError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.speed import RecomputeCheap
from outgrow.trainers.engines.activations import checkpoint_activations
from outgrow.trainers.engines.offload import offload_activations
from outgrow.trainers.models.families import blocks
from outgrow.trainers.models.graphs import allow_graphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_blocks(model: PreTrainedModel, recipe: Recipe) -> None:
    """Make each block of ``model`` compile, recompute and offload as the recipe says. Every engine calls it before it shards.

    A whole block that is computed again runs its compiled graph twice: compiling lies inside. A choice of single operations is
    carried out by the compiler where there is one, which must see it: compiling lies outside. Raises ``PlanError`` where
    compiling was asked for and there is no C++ compiler.
    """
    each = blocks(model)
    compiled = recipe.compile == "blocks"
    if compiled:
        _require_compiler()
    chooses_operations = isinstance(recipe.activation_checkpointing, RecomputeCheap)
    if compiled and not chooses_operations:
        _compile(each)
    checkpoint_activations(each, recipe.activation_checkpointing)
    if compiled and chooses_operations:
        _compile(each)
    if recipe.activation_offload:
        offload_activations(each)


def _require_compiler() -> None:
    """torch compiles C++ for a CPU, and what launches its kernels for a GPU; it would say so in the first step alone."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise PlanError(
            "compile: blocks needs a C++ compiler, and there is none on this machine",
            hint="make system-deps installs g++; or compile: none",
        )


def _compile(blocks: Sequence[nn.Module]) -> None:
    allow_graphs()
    for block in blocks:
        block.forward = torch.compile(block.forward)
