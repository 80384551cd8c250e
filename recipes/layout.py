"""How many steps, and which rank computes which rows: pure arithmetic of a recipe and the number of ranks.

Asked again at every (re)start. The rows of a step are the same at any world size; a layout only deals them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal

from outgrow.contracts import EngineName, Layout
from outgrow.errors import PlanError
from outgrow.recipes.mix import Mix, stage_lengths
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import AutoParallel, Ddp, Parallel, Zero


def resolve(recipe: Recipe, world: int, local_world: int) -> Layout:
    """The layout of ``world`` ranks, ``local_world`` of them on each node.

    Raises ``PlanError`` where there are more ranks than rows in a batch, or where a shard does not divide the ranks.
    """
    rows = recipe.batch.rows
    if world > rows:
        raise PlanError(
            f"batch.rows is {rows}, too few for {world} ranks; allowed: at most one rank a row",
            hint=f"run with at most {rows} workers, or raise batch.rows to {world}",
        )
    shard = _shard(recipe.parallel, world, local_world)
    rank_rows = math.ceil(rows / world)
    asked = recipe.batch.micro_rows
    micro_rows = rank_rows if asked == "auto" else min(asked, rank_rows)
    return Layout(
        engine=_engine(recipe.parallel, world),
        world=world,
        replicate=world // shard,
        shard=shard,
        global_rows=rows,
        micro_rows=micro_rows,
        accumulation=math.ceil(rank_rows / micro_rows),
    )


def total_steps(recipe: Recipe, mix: Mix | None = None) -> int:
    """Optimizer steps of the whole run. Only a duration in epochs asks for the dataset's ``mix``."""
    duration = recipe.duration
    if duration.steps is not None:
        return duration.steps
    if duration.tokens is not None:
        return _steps_of(duration.tokens, recipe)
    assert mix is not None, "how many steps an epoch has follows from the dataset"
    # Decimal of the figure as written: in binary, 0.1 of 30 steps would round up to 4.
    return math.ceil(Decimal(str(duration.epochs)) * mix.steps_per_epoch)


def positions(recipe: Recipe, steps: int) -> int:
    """Tokens that ``steps`` steps would see if every row were full and no epoch ended with a short step."""
    return sum(part * recipe.batch.rows * length for part, length in _parts(recipe, steps))


def _steps_of(tokens: int, recipe: Recipe) -> int:
    """The fewest steps that have so many positions, stage by stage."""
    steps = 0
    for own, length in stage_lengths(recipe):
        wanted = -(-tokens // (recipe.batch.rows * length))
        if own is None or wanted <= own:
            return steps + wanted
        steps += own
        tokens -= own * recipe.batch.rows * length
    raise AssertionError("the last stage has no end")


def _parts(recipe: Recipe, steps: int) -> Iterator[tuple[int, int]]:
    """How many of ``steps`` steps each stage has, and its tokens a row."""
    for own, length in stage_lengths(recipe):
        part = steps if own is None else min(own, steps)
        yield part, length
        steps -= part


def _engine(parallel: Parallel, world: int) -> EngineName:
    if isinstance(parallel, AutoParallel):
        return "plain" if world == 1 else "fsdp2"
    # The gradients of one rank need no sum over ranks.
    return "plain" if isinstance(parallel, Ddp) and world == 1 else parallel.kind


def _shard(parallel: Parallel, world: int, local_world: int) -> int:
    """Ranks that share one copy of the model; divides ``world``."""
    if isinstance(parallel, Ddp):
        return 1
    asked = "all" if isinstance(parallel, AutoParallel | Zero) else parallel.shard
    if asked == "all":
        return world
    shard = local_world if asked == "node" else asked
    if world % shard:
        given = f"node ({local_world} ranks on this one)" if asked == "node" else str(asked)
        fits = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise PlanError(
            f"parallel.shard is {given}, which does not divide {world} ranks; allowed: {fits}",
            hint="set parallel.shard to one of these, or run with another number of workers",
        )
    return shard
