"""How many parameters of each sort a recipe makes of a model, and the bytes that the optimizer keeps of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from outgrow.contracts import ModelFacts
from outgrow.recipes.memory.activations import MASTER_BYTES
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.model import CustomModel
from outgrow.recipes.schema.optimizer import AdamW8bit, Muon

Sort: TypeAlias = Literal["trained", "frozen", "packed"]

SCALES_8BIT = 8 / 256
"""Bytes a parameter of the scales of two moments in 8 bits: one in float32 for 256 values."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: ``trained``, of which ``matrices`` are matrices within blocks; frozen ones in the precision that
    computes; and ``packed`` ones, frozen in 4 bits."""

    trained: int = 0
    matrices: int = 0
    frozen: int = 0
    packed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.trained + other.trained,
            self.matrices + other.matrices,
            self.frozen + other.frozen,
            self.packed + other.packed,
        )


@dataclass(frozen=True)
class Parts:
    """Counts of the whole model, of its largest block, of what lies outside of blocks (``root``), and of what of that FSDP2
    gathers as one (``outside``): the larger one of embedding and head, or all of it where they share their weights."""

    whole: Counts
    block: Counts
    root: Counts
    outside: Counts


def count(recipe: Recipe, facts: ModelFacts) -> Parts:
    """How many parameters of each sort a recipe makes of the model."""
    names = _by_block(facts)
    beside = names.pop("", ())
    root = _counted(recipe, facts, beside, within=False)
    blocks = [_counted(recipe, facts, inside, within=True) for inside in names.values()]
    return Parts(
        whole=sum(blocks, root),
        block=max(blocks, key=_size, default=Counts()),
        root=root,
        outside=root if facts.tied_embeddings or isinstance(recipe.model, CustomModel) else _largest(recipe, facts, beside),
    )


def _largest(recipe: Recipe, facts: ModelFacts, names: Iterable[str]) -> Counts:
    """Counts of the module of ``names`` that takes most, gathered and with its gradient."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    each = (_counted(recipe, facts, own, within=False) for own in modules.values())
    return max(each, key=lambda counts: _size(counts) + counts.trained, default=Counts())


def _size(counts: Counts) -> int:
    return counts.trained + counts.frozen + counts.packed


def state_bytes(recipe: Recipe, facts: ModelFacts) -> int:
    """Bytes of all that a checkpoint keeps: the trained parameters as the optimizer steps them, and its states."""
    if not facts.shapes:
        return facts.parameters * 3 * MASTER_BYTES[recipe.precision]
    return states(recipe, count(recipe, facts).whole)


def _by_block(facts: ModelFacts) -> dict[str, tuple[str, ...]]:
    """Names of parameters by the name of the block that they are in; ``""`` for what is in none."""
    blocks = set(facts.block_names)
    found: dict[str, list[str]] = {}
    for name in facts.shapes:
        parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
        found.setdefault(next((parent for parent in parents if parent in blocks), ""), []).append(name)
    return {block: tuple(names) for block, names in found.items()}


def _counted(recipe: Recipe, facts: ModelFacts, names: Iterable[str], *, within: bool) -> Counts:
    counted, matrices = Counter[Sort](), 0
    for sort, shape in tensors(recipe, facts, names):
        counted[sort] += prod(shape)
        matrices += prod(shape) if within and sort == "trained" and len(shape) > 1 else 0
    return Counts(counted["trained"], matrices, counted["frozen"], counted["packed"])


def tensors(recipe: Recipe, facts: ModelFacts, names: Iterable[str]) -> Iterator[tuple[Sort, tuple[int, ...]]]:
    """Sort and shape of every parameter that a recipe makes of those of ``names``, an adapter's own ones among them."""
    adapter = recipe.adapter
    linear, whole, adapted = set(facts.linear), set(facts.whole), set(facts.adapted)
    for name in names:
        shape = facts.shapes[name]
        if not isinstance(adapter, Lora) or name in whole:
            yield "trained", shape
            continue
        if name in adapted:
            yield "trained", (adapter.rank, shape[1])
            yield "trained", (shape[0], adapter.rank)
            if adapter.dora:
                yield "trained", shape[:1]
        yield "packed" if adapter.base == "nf4" and name in linear else "frozen", shape


def optimizer_bytes(recipe: Recipe, counts: Counts) -> float:
    exact = MASTER_BYTES[recipe.precision]
    if isinstance(recipe.optimizer, AdamW8bit):
        return (2 + SCALES_8BIT) * counts.trained
    if isinstance(recipe.optimizer, Muon):
        return exact * (2 * counts.trained - counts.matrices)
    return 2 * exact * counts.trained


def states(recipe: Recipe, counts: Counts) -> int:
    return round(MASTER_BYTES[recipe.precision] * counts.trained + optimizer_bytes(recipe, counts))
