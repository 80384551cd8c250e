"""How many steps, and which rank computes which rows: pure arithmetic of a recipe and the number of ranks.

Asked again at every (re)start. The rows of a step are the same at any world size; a layout only deals them out.
"""

from __future__ import annotations

import math
from decimal import Decimal

from outgrow.contracts import EngineName, Layout
from outgrow.errors import PlanError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.training import AutoParallel, Fsdp2


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


def steps_per_epoch(rows: int, recipe: Recipe) -> int:
    """Optimizer steps that see each of the dataset's ``rows`` once.

    The last step of an epoch takes the rows that are left, be they fewer: none is doubled, none dropped.
    """
    return math.ceil(rows / recipe.batch.rows)


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run over a dataset of ``rows`` rows. Raises ``PlanError`` where it has none."""
    if rows < 1:
        raise PlanError("the dataset has no row to train on", hint="lower data.sequence_length, or give more text")
    duration = recipe.duration
    if duration.steps is not None:
        return duration.steps
    if duration.tokens is not None:
        return math.ceil(duration.tokens / (recipe.batch.rows * recipe.data.sequence_length))
    # Decimal of the figure as written: in binary, 0.1 of 30 steps would round up to 4.
    return math.ceil(Decimal(str(duration.epochs)) * steps_per_epoch(rows, recipe))


def _engine(parallel: AutoParallel | Fsdp2, world: int) -> EngineName:
    return "plain" if isinstance(parallel, AutoParallel) and world == 1 else "fsdp2"


def _shard(parallel: AutoParallel | Fsdp2, world: int, local_world: int) -> int:
    """Ranks that share one copy of the model; divides ``world``."""
    asked = "all" if isinstance(parallel, AutoParallel) else parallel.shard
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
