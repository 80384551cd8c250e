"""Ranks: which of them is slow, silent or gone.

Ranks wait for each other in the collectives within forward and backward, so a slow rank makes all steps equally long.
Waiting for data and the optimizer are a rank's own: there it shows.
"""

from __future__ import annotations

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.frame import Page, Row
from outgrow.monitoring.dashboards.panels import Look, Panel, bars, curves, rows, state_line, tile
from outgrow.monitoring.dashboards.queries import NODES, RUN, of, rate

HERE = (RUN, NODES)
UP = {"gone": "red", "there": "green"}
EACH = "rank {{rank}} on {{node}}"
OWN = 'phase=~"data_wait|optimizer"'


def page() -> Page:
    return Page(
        uid="outgrow-ranks",
        title="outgrow / Ranks",
        tells="Which rank is slow, silent or gone: own work, lag, memory and loss of each.",
        run=RUN,
        has_nodes=True,
        rows=[
            Row(title="Now", panels=_now()),
            Row(title="Stragglers", panels=_stragglers()),
            Row(title="Each rank", panels=_each()),
        ],
    )


def _own() -> str:
    return f"sum by (node, rank) ({rate(m.RANK_PHASE_SECONDS, *HERE, OWN)})"


def _now() -> list[Panel]:
    return [
        tile(
            "Ranks up",
            "Processes that are there. Fewer than the world: see which below, and the kernel's log of its node.",
            (f"sum({of(m.RANK_UP, *HERE)})", "up"),
            Look(unit="none", base="blue"),
            width=4,
        ),
        tile(
            "Ranks gone",
            "Processes that are gone without having said so.",
            (f"count({of(m.RANK_UP, *HERE)}) - sum({of(m.RANK_UP, *HERE)})", "gone"),
            Look(unit="none", limits=((1, "red"),)),
            width=4,
        ),
        tile(
            "Steps apart",
            "Between the furthest rank and the last one. Above 1 for long: the last one hangs, see the stacks that its agent "
            "wrote.",
            (f"max({of(m.RANK_STEP, *HERE)}) - min({of(m.RANK_STEP, *HERE)})", "steps"),
            Look(unit="none", limits=((2, "red"),)),
            width=4,
        ),
        tile(
            "Slowest rank's own work over the median's",
            "Waiting for data and optimizer, which no other rank can slow down. Above 1.5 and more than 5% of the time: the "
            "alert OutgrowStraggler.",
            (f"max({_own()}) / quantile(0.5, {_own()})", "slowest"),
            Look(unit="none", decimals=2, limits=((1.2, "orange"), (1.5, "red"))),
            width=6,
        ),
        tile(
            "Longest silence",
            "Seconds since the last sign of life of the rank that has been silent longest.",
            (f"max(time() - {of(m.RANK_LAST_PROGRESS_TIME, *HERE)})", "silent"),
            Look(unit="s", limits=((60, "orange"), (300, "red"))),
            width=6,
        ),
    ]


def _stragglers() -> list[Panel]:
    return [
        curves(
            "Own work of each rank",
            "Share of time in data_wait and optimizer. One line above the others is the rank that all others wait for: look "
            "at its node's disk (data_wait) or its card's clock (optimizer).",
            [(_own(), EACH)],
            Look(unit="percentunit"),
            width=12,
            is_table=True,
        ),
        bars(
            "Waiting for data by rank",
            "Share of time of late. One rank alone: its node's first tier. All: the source.",
            (f"sum by (node, rank) ({rate(m.RANK_PHASE_SECONDS, *HERE, DATA_WAIT)})", EACH),
            Look(unit="percentunit", limits=((0.05, "orange"), (0.1, "red"))),
            width=6,
        ),
        bars(
            "Optimizer by rank",
            "Share of time of late. A rank well above the others computes slower: heat, power, another program on the card.",
            (f"sum by (node, rank) ({rate(m.RANK_PHASE_SECONDS, *HERE, OPTIMIZER)})", EACH),
            Look(unit="percentunit"),
            width=6,
        ),
        curves(
            "Behind the furthest rank",
            "Steps. Ranks meet in every step, so more than one is a rank that hangs.",
            [(f"scalar(max({of(m.RANK_STEP, *HERE)})) - max by (node, rank) ({of(m.RANK_STEP, *HERE)})", EACH)],
            Look(unit="none", limits=((2, "red"),)),
        ),
        curves(
            "Silence",
            "Seconds since a rank's last sign of life. Saw teeth are steps; a ramp is a rank that hangs.",
            [(f"time() - max by (node, rank) ({of(m.RANK_LAST_PROGRESS_TIME, *HERE)})", EACH)],
            Look(unit="s"),
        ),
        state_line(
            "Up",
            "Red from the moment that the rank's process is gone without having said so.",
            (f"1 + max by (node, rank) ({of(m.RANK_UP, *HERE)})", EACH),
            UP,
            width=8,
            height=8,
        ),
    ]


def _each() -> list[Panel]:
    return [
        curves(
            "Loss of a rank's own rows",
            "Noisy, but equal on average. One rank that is always apart reads other data or computes wrongly: test its card.",
            [(f"max by (node, rank) ({of(m.RANK_LOSS, *HERE)})", EACH)],
            Look(unit="none", decimals=3, at_least=None),
        ),
        curves(
            "Processors",
            "Cores that a rank's process keeps busy, loader workers not counted. Near 1 on a GPU run: Python holds the card "
            "up.",
            [(f"sum by (node, rank) ({rate(m.RANK_CPU_SECONDS, *HERE)})", EACH)],
            Look(unit="short"),
        ),
        curves(
            "Steps ready ahead",
            "Steps that a rank's loader workers hold ready. At 0 the next step waits for data.",
            [(f"max by (node, rank) ({of(m.RANK_LOADER_READY, *HERE)})", EACH)],
            Look(unit="none"),
        ),
        rows(
            "All ranks",
            "Memory as the device's allocator and the kernel count it. Ranks of one layout need about the same.",
            {
                "Step": (f"max by (rank) ({of(m.RANK_STEP, *HERE)})", "none"),
                "Peak": (f"max by (rank) ({of(m.RANK_MEMORY, *HERE, PEAK)})", "bytes"),
                "RAM": (f"max by (rank) ({of(m.RANK_MEMORY, *HERE, ANON)})", "bytes"),
                "Retries": (f"max by (rank) ({of(m.RANK_ALLOCATION_RETRIES, *HERE)})", "none"),
                "Own work": (f"sum by (rank) ({rate(m.RANK_PHASE_SECONDS, *HERE, OWN)})", "percentunit"),
            },
            key="rank",
        ),
    ]


DATA_WAIT, OPTIMIZER = 'phase="data_wait"', 'phase="optimizer"'
PEAK, ANON = 'kind="peak"', 'kind="anon"'
