"""The report of a run as a page: its plots and tables, and what it says beside them."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from outgrow.html_page import render_page, visible
from outgrow.monitoring.report import tables
from outgrow.monitoring.report.advice import advice
from outgrow.monitoring.report.comparison import over_tokens, recipe_keys, results
from outgrow.monitoring.report.curves import MOST_POINTS
from outgrow.monitoring.report.facts import RunFacts
from outgrow.monitoring.report.plots import Shown, figures
from outgrow.monitoring.report.template import BODY


def render(run: RunFacts, others: Sequence[RunFacts] = ()) -> str:
    """The page, HTML; ``others`` are drawn beside ``run`` and compared with it. The same facts give the same page."""
    shown = Shown(run=run, others=others, over_tokens=over_tokens(run, others))
    plots = figures(shown)
    return render_page(
        f"Run {run.name}",
        BODY,
        plots,
        drawn_plots=set(plots),
        name=run.name,
        state=_sentence(run),
        created=run.stored.created[:19].replace("T", " "),
        until=tables.when(run.last.time) if run.last else "—",
        fingerprint=run.stored.ref.fingerprint,
        tiles=tables.tiles(run),
        most_points=f"{MOST_POINTS:,}",
        restarts=len(run.starts) > 1,
        undone=f"{run.undone_records:,}" if run.undone_records else "",
        over_tokens=shown.over_tokens,
        advice=advice(run),
        compared=bool(others),
        results=results(run, others) if others else [],
        keys=recipe_keys(run, others) if others else [],
        all_left=tuple(range(1, len(others) + 3)),
        phases=tables.phases(run),
        wall=tables.wall(run),
        starts=tables.starts(run),
        more_starts=max(0, len(run.starts) - tables.SHOWN_STARTS),
        memory=tables.memory(run),
        memory_plan="The plan names no memory: there is nothing to measure it against.",
        tiers=tables.tiers(run),
        cache=tables.cache(run),
        saves=tables.saves(run),
        saves_note=tables.saves_note(run),
        plan=tables.plan(run),
        has_plan=run.plan is not None,
        samples=tables.samples(run),
        versions=tables.versions(run),
        recipe=visible(yaml.safe_dump(run.stored.recipe, sort_keys=False, allow_unicode=True)),
    )


def _sentence(run: RunFacts) -> str:
    """The state, and how far."""
    last = run.last
    at = f" at step {last.step:,} of {last.steps:,}" if last else ""
    return f"{run.state[:1].upper()}{run.state[1:]}{at}"
