"""The learning rate of every optimizer step: pure functions of the recipe, the step and the number of steps.

Steps count from 0. Warm-up of ``w`` steps gives ``(step + 1) / w`` of the peak, so that no step is spent at zero and step
``w - 1`` is the first at the peak (step 0 without warm-up). What falls afterwards reaches ``final_fraction`` exactly at
the last step.
"""

from __future__ import annotations

import math
from functools import cache
from pkgutil import resolve_name
from typing import Any

from outgrow.errors import RecipeError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.training import Constant, Cosine, CustomSchedule, Linear, WarmupStableDecay


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) in a run of ``steps``. Raises ``RecipeError`` for a faulty custom schedule."""
    return recipe.optimizer.learning_rate * share_of_peak(recipe.schedule, step, steps)


def share_of_peak(schedule: Constant | Linear | Cosine | WarmupStableDecay | CustomSchedule, step: int, steps: int) -> float:
    """The learning rate of ``step`` as a share of the peak; 0 to 1, but for a custom schedule, which may go beyond 1."""
    if isinstance(schedule, CustomSchedule):
        return _custom(schedule, step, steps)
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    peak = max(schedule.warmup_steps - 1, 0)
    match schedule:
        case Constant():
            return 1.0
        case Linear():
            return _between(1.0, schedule.final_fraction, _progress(step, peak, steps - 1))
        case Cosine():
            fall = (1 - math.cos(math.pi * _progress(step, peak, steps - 1))) / 2
            return _between(1.0, schedule.final_fraction, fall)
        case WarmupStableDecay():
            falling = max(1, round(schedule.decay_fraction * steps))
            start = max(peak, steps - 1 - falling)
            return _between(1.0, schedule.final_fraction, _progress(step, start, steps - 1))


def _progress(step: int, start: int, end: int) -> float:
    """How far ``step`` is from ``start`` (0) to ``end`` (1)."""
    return 0.0 if step <= start else (step - start) / (end - start)


def _between(first: float, last: float, t: float) -> float:
    return first + (last - first) * t


def _custom(schedule: CustomSchedule, step: int, steps: int) -> float:
    try:
        share = _factory(schedule.factory)(step=step, steps=steps, **schedule.options)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{schedule.factory}(step={step}, steps={steps}, **options) raised {type(error).__name__}: {error}",
            where="schedule.factory",
        ) from error
    if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share) or share < 0:
        raise RecipeError(
            f"{schedule.factory} returned {share!r} for step {step}; allowed: a finite number of at least 0",
            where="schedule.factory",
        )
    return float(share)


@cache
def _factory(name: str) -> Any:
    try:
        return resolve_name(name)
    except Exception as error:  # as it is imported foreign code runs, and may not even be Python
        raise RecipeError(
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            where="schedule.factory",
            hint="the module must be importable on every node: install it there, or check its name",
        ) from error
