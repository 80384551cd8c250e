"""How a run differs from others: what its recipe says otherwise, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from outgrow.html_page import Table, short, visible
from outgrow.monitoring.live import duration
from outgrow.monitoring.report.facts import RunFacts
from outgrow.recipes.identity import differences

_MOST_CHARS = 120
_TOLERANCE = 0.01


def over_tokens(run: RunFacts, others: Sequence[RunFacts]) -> bool:
    """Whether steps of these runs are of different size, so that curves belong over tokens."""
    sizes = [own.steps[-1].tokens / own.steps[-1].step for own in (run, *others) if own.steps and own.steps[-1].step]
    return bool(sizes) and max(sizes) > (1 + _TOLERANCE) * min(sizes)


def results(run: RunFacts, others: Sequence[RunFacts]) -> Table:
    """A column a run, a row for each thing that came of it."""
    runs = (run, *others)
    rows: list[tuple[str, Callable[[RunFacts], str]]] = [
        ("state", lambda own: own.state),
        ("steps", lambda own: f"{own.last.step:,} of {own.last.steps:,}" if own.last else "—"),
        ("tokens", lambda own: f"{short(own.last.tokens).strip()}" if own.last else "—"),
        ("training loss", lambda own: loss_text(own.steps[-1].loss if own.steps else None)),
        ("validation loss", lambda own: loss_text(own.validations[-1].loss if own.validations else None)),
        ("lowest validation loss", lambda own: loss_text(lowest_validation(own))),
        ("tokens/s, median", lambda own: speed_text(own)),
        ("goodput", lambda own: goodput_text(own)),
        ("wall time", lambda own: duration(own.accounts[-1].wall_s) if own.accounts else "—"),
        ("restarts", lambda own: f"{max(0, len(own.starts) - 1):,}"),
    ]
    return [("", *(own.name for own in runs)), *((name, *(tell(own) for own in runs)) for name, tell in rows)]


def recipe_keys(run: RunFacts, others: Sequence[RunFacts]) -> Table:
    """A row for each key of the recipe that is not the same in all runs; only the head where none differs."""
    changed = [{d.key: d for d in differences(run.stored.recipe, other.stored.recipe)} for other in others]
    keys = dict.fromkeys(key for own in changed for key in own)
    rows: Table = [("key", run.name, *(other.name for other in others))]
    for key in keys:
        mine = next(own[key].old for own in changed if key in own)
        rows.append((key, _value(mine), *(_value(own[key].new) if key in own else "same" for own in changed)))
    return rows


def lowest_validation(run: RunFacts) -> float | None:
    return min((own.loss for own in run.validations if own.loss is not None and own.loss == own.loss), default=None)


def median_speed(run: RunFacts) -> float | None:
    """Tokens a second, the median of the logged steps."""
    found = [own.tokens_per_s for own in run.steps if own.tokens_per_s]
    return median(found) if found else None


def speed_text(run: RunFacts) -> str:
    speed = median_speed(run)
    return "—" if speed is None else f"{speed:,.0f}"


def goodput_text(run: RunFacts) -> str:
    return f"{run.accounts[-1].goodput:.1%}" if run.accounts else "—"


def loss_text(loss: float | None) -> str:
    return "—" if loss is None else f"{loss:.4f}"


def _value(value: Any) -> str:
    text = visible(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
