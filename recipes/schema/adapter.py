"""``adapter``: what of a model is trained: all of it, or small matrices beside frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Section

Pattern = Annotated[str, Field(min_length=1)]


class NoAdapter(Section):
    """Every parameter is trained."""

    kind: Literal["none"] = "none"


class Lora(Section):
    """LoRA (Hu et al. 2021) through peft: two small matrices beside each chosen one, which is frozen."""

    kind: Literal["lora"]
    rank: int = Field(default=16, ge=1, le=1024)
    """Inner width of the two matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """What they add is scaled by ``alpha / rank``, or by ``alpha / sqrt(rank)`` with ``scaling: rslora``."""
    scaling: Literal["standard", "rslora"] = "standard"
    """``rslora``: rank-stabilised (Kalajdzievski 2023), for large ranks."""
    dora: bool = False
    """Learn the length of each output's weights too (DoRA, Liu et al. 2024)."""
    targets: Literal["all-linear"] | Annotated[tuple[Pattern, ...], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: ``all-linear``, all of the blocks; or patterns of their names, such as ``q_proj`` or
    ``model.layers.1?.mlp.*``."""
    fully_trained: tuple[Pattern, ...] = ()
    """Modules that are trained whole, by the same patterns: ``embed_tokens``, ``lm_head``, ``*norm``."""
    base: Literal["full", "nf4"] = "full"
    """How the frozen linear layers of the blocks are kept: in the precision of the run, or in 4 bits (NF4 with double
    quantisation through bitsandbytes: QLoRA, Dettmers et al. 2023)."""

    def rules(self) -> Iterator[tuple[str, str]]:
        both = set(self.fully_trained) & set(self.targets if isinstance(self.targets, tuple) else ())
        if both:
            yield "fully_trained", f"{', '.join(sorted(both))}: also in targets; a module is one or the other"


Adapter = Annotated[NoAdapter | Lora, Field(discriminator="kind")]
