"""Goodput and time: what every second since the first start went to, for several runs side by side."""

from __future__ import annotations

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.frame import Page, Row
from outgrow.monitoring.dashboards.panels import Look, Panel, bars, curves, rows, state_line
from outgrow.monitoring.dashboards.queries import (
    RUNS,
    STATES,
    WALL,
    goodput,
    grown,
    newest,
    of,
    rate,
    state,
    total,
    wall_share,
)

LOST = 'kind!="productive"'


def page() -> Page:
    return Page(
        uid="outgrow-goodput",
        title="outgrow / Goodput and time",
        tells="What every second since the first start of a run went to, and what was lost to which cause.",
        run=RUNS,
        has_nodes=False,
        time="now-24h",
        rows=[
            Row(title="Runs", panels=_runs()),
            Row(title="Time", panels=_time()),
            Row(title="Work", panels=_work()),
        ],
    )


def _runs() -> list[Panel]:
    return [
        rows(
            "Runs",
            "Goodput: productive seconds of all seconds since the first start. Stall limit: seconds without a step after "
            "which a run counts as stalled.",
            {
                "Active": (f"max by (run) ({of(m.RUN_ACTIVE, RUNS)})", "bool_yes_no"),
                "Progress": (f"{newest(m.RUN_STEP, RUNS)} / {newest(m.RUN_PLANNED_STEPS, RUNS)}", "percentunit"),
                "Goodput": (goodput(RUNS), "percentunit"),
                "Wall time": (f"sum by (run) ({total(m.RUN_WALL_SECONDS, RUNS)})", "s"),
                "Time left": (newest(m.RUN_REMAINING_SECONDS, RUNS), "s"),
                "Cost of the rest": (newest(m.RUN_REMAINING_DOLLARS, RUNS), "currencyUSD"),
                "Restarts": (f"sum by (run) ({total(m.RUN_RESTARTS, RUNS)})", "none"),
                "Loss": (newest(m.RUN_LOSS, RUNS), "none"),
                "Stall limit": (newest(m.RUN_STALL_AFTER, RUNS), "s"),
            },
            key="run",
            height=7,
        ),
        state_line("State", "Over time, as the node agents saw it.", (state(RUNS), "{{run}}"), STATES, width=24),
    ]


def _time() -> list[Panel]:
    return [
        curves(
            "What the seconds go to",
            "Share of the time of late by kind. recompute after restarts: shorter checkpoint intervals. stalled: data or a "
            "hanging rank. init: long starts, many restarts.",
            [(wall_share(RUNS), "{{run}} {{kind}}")],
            Look(unit="percentunit", at_most=1),
            width=12,
            stacked=True,
        ),
        curves(
            "Goodput since the first start",
            "Productive seconds of all seconds, restarts and pauses included. It recovers slowly from a bad night; the panel "
            "to the left shows the present.",
            [(goodput(RUNS), "{{run}}")],
            Look(unit="percentunit", at_most=1, base="red", limits=((0.7, "orange"), (0.9, "green"))),
            width=12,
        ),
        bars(
            "All seconds since the first start",
            "They add up to the wall time.",
            (f"sum by (kind) ({total(m.RUN_WALL_SECONDS, RUNS)})", "{{kind}}"),
            Look(unit="s", colours=WALL),
        ),
        bars(
            "Lost in the time shown",
            "Seconds that were not productive, by what took them: the longest bar is what to work on.",
            (f"sum by (kind) ({grown(m.RUN_WALL_SECONDS, RUNS, LOST)})", "{{kind}}"),
            Look(unit="s", colours=WALL),
        ),
        bars(
            "Restarts in the time shown",
            "By cause; each costs init, restore and the steps since the last checkpoint.",
            (f"sum by (cause) ({grown(m.RUN_RESTARTS, RUNS)})", "{{cause}}"),
            Look(unit="none", decimals=0, base="orange"),
        ),
    ]


def _work() -> list[Panel]:
    return [
        curves(
            "Model FLOPs a second",
            "Forward and backward of the model, recomputed activations not counted.",
            [(f"sum by (run) ({rate(m.RUN_MODEL_FLOPS, RUNS)})", "{{run}}")],
            Look(unit="flops"),
        ),
        curves(
            "Valid tokens a second",
            "Those computed again after a restart included.",
            [(f"sum by (run) ({rate(m.RUN_TOKENS, RUNS, VALID)})", "{{run}}")],
            Look(unit="short"),
        ),
        curves(
            "Tokens since the first start",
            "Valid and padding, those computed again included.",
            [(total(m.RUN_TOKENS, RUNS), "{{run}} {{kind}}")],
            Look(unit="short"),
        ),
    ]


VALID = 'kind="valid"'
