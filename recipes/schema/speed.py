"""Switches that change speed and memory and not what is learned: attention kernels, the loss in parts, compiling, what the
backward pass finds kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Section

Attention = Literal["auto", "eager", "sdpa", "flex", "varlen", "flash_attention_2"]
Compile = Literal["none", "blocks"]


class WholeLogits(Section):
    """The scores of all tokens of a micro-batch at once."""

    kind: Literal["whole"] = "whole"


class ChunkedLogits(Section):
    """Some tokens at a time, and their gradients while their scores are there: never more than a chunk of scores in memory."""

    kind: Literal["chunked"]
    tokens: int = Field(default=1024, ge=1)
    """Tokens whose scores are in memory at a time."""


class LigerLoss(Section):
    """Liger's fused kernel of head and cross-entropy; needs ``pip install liger-kernel`` and a GPU."""

    kind: Literal["liger"]


CrossEntropy = Annotated[WholeLogits | ChunkedLogits | LigerLoss, Field(discriminator="kind")]


class KeepAll(Section):
    """Every activation is kept for the backward pass."""

    kind: Literal["none"] = "none"


class RecomputeBlocks(Section):
    """Whole blocks are computed again: their inputs alone are kept."""

    kind: Literal["full"]
    every: int = Field(default=1, ge=1)
    """Every how manieth block; 2 recomputes half of them."""


class RecomputeCheap(Section):
    """Results of the operations in ``keep`` are kept, all else is computed again (Korthikanti et al. 2022)."""

    kind: Literal["selective"]
    keep: tuple[Literal["matmul", "attention", "every_second_matmul"], ...] = ("matmul", "attention")
    """Operations whose results are kept, by what they do."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if {"matmul", "every_second_matmul"} <= set(self.keep):
            yield "keep", "matmul keeps every product, every_second_matmul half of them; allowed: one of the two"


ActivationCheckpointing = Annotated[KeepAll | RecomputeBlocks | RecomputeCheap, Field(discriminator="kind")]
