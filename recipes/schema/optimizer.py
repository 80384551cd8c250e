"""``optimizer``: how parameters move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Section


class _Optimizer(Section):
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; norms, biases and other one-dimensional parameters get none."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 never clips."""


class _Adam(_Optimizer):
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", f"given {list(self.betas)}; allowed: two numbers, each at least 0 and below 1"


class AdamW(_Adam):
    """AdamW (Loshchilov and Hutter 2019), PyTorch's fused kernel."""

    kind: Literal["adamw"] = "adamw"


class AdamW8bit(_Adam):
    """AdamW whose two moments are kept in 8 bits, in blocks with a scale each (Dettmers et al. 2022): 2 bytes a parameter where
    AdamW has 8."""

    kind: Literal["adamw_8bit"]


class Muon(_Adam):
    """Muon (Jordan et al. 2024) for the matrices within blocks: momentum made orthogonal by Newton-Schulz steps. Embedding,
    head and all that is no matrix move by AdamW, with ``betas`` and ``eps``."""

    kind: Literal["muon"]
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum, Nesterov's."""
    adamw_learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate of what moves by AdamW; it follows the same schedule."""


Optimizer = Annotated[AdamW | AdamW8bit | Muon, Field(discriminator="kind")]
