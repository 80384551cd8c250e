"""Whether what a recipe wants to be measured can be: the streams that its guard and its choice of checkpoints go by."""

from __future__ import annotations

from outgrow.contracts import DatasetCard
from outgrow.errors import PlanError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.training import TOTAL, NoGuard


def require_measured(recipe: Recipe, card: DatasetCard) -> None:
    """Nothing where every validation loss that the recipe names has rows. Raises ``PlanError`` where one has none.

    ``checkpoint.best_by: total`` is the default and asks for nothing: without held-out rows no checkpoint is the best.
    """
    guard, best_by = recipe.validation.on_rise, recipe.checkpoint.best_by
    named = {} if best_by == TOTAL else {"checkpoint.best_by": best_by}
    if not isinstance(guard, NoGuard):
        named["validation.on_rise.metric"] = guard.metric
    general = {stream.name for stream in recipe.data.streams if stream.use == "validation"}
    rows = {stream.name: stream.validation_rows for stream in card.streams}
    rows[TOTAL] = sum(count for name, count in rows.items() if name not in general)
    for key, name in named.items():
        if not rows[name]:
            measured = [other for other, count in rows.items() if count]
            raise PlanError(
                f"{key} is {name}, of which no document is held out; measured: {', '.join(measured) or 'nothing'}",
                hint="raise data.validation_fraction, or add a stream with use: validation and name that",
            )
