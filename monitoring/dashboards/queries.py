"""PromQL that every dashboard needs: selectors of declared metrics, and the newest word about a run.

A run whose rank 0 has moved leaves its old node's agent behind, which still serves what it knew: so gauges of a run are taken
from the node of its newest start, and counters, which go on over starts, by their maximum or as sums of rates.
"""

from __future__ import annotations

from outgrow.monitoring import metrics as m
from outgrow.monitoring.metrics import Metric
from outgrow.monitoring.recording.slots import PHASES

RUN = 'run="$run"'
"""The run of a dashboard that shows one."""
RUNS = 'run=~"$run"'
"""The runs of a dashboard that compares them."""
NODES = 'node=~"$node"'

PHASE = {
    "data_wait": "red",
    "forward": "green",
    "backward": "dark-green",
    "collectives": "orange",
    "optimizer": "blue",
    "checkpoint": "purple",
    "validation": "yellow",
}
assert tuple(PHASE) == PHASES
WALL = {
    "productive": "green",
    "init": "blue",
    "checkpoint": "purple",
    "restore": "light-blue",
    "recompute": "orange",
    "stalled": "red",
    "idle": "#808080",
}
"""Colours that a kind of time has on every dashboard."""

STATES = {
    "lost": "dark-red",
    "interrupted": "yellow",
    "failed": "red",
    "finished": "blue",
    "starting": "light-blue",
    "restarting": "orange",
    "stalled": "purple",
    "running": "green",
}
"""Colours of the states of a run. Where two nodes tell of one run, the later in this order is right: a run that a node has
lost may well run on another."""
assert set(STATES) == set(m.RUN_STATES)


def of(metric: Metric, *matchers: str, suffix: str = "") -> str:
    """The selector of a metric's series."""
    assert all(matcher.split("=")[0].rstrip("!") in metric.labels for matcher in matchers), f"{metric.name}: {matchers}"
    return f"{metric.name}{suffix}{{{','.join(matchers)}}}" if matchers else f"{metric.name}{suffix}"


def is_(label: str, value: str) -> str:
    """A matcher."""
    return f'{label}="{value}"'


def rate(metric: Metric, *matchers: str, suffix: str = "") -> str:
    """Growth a second of a counter."""
    return f"rate({of(metric, *matchers, suffix=suffix)}[$__rate_interval])"


def grown(metric: Metric, *matchers: str) -> str:
    """Growth of a counter in the time that is shown."""
    return f"increase({of(metric, *matchers)}[$__range])"


def newest(metric: Metric, run: str, *matchers: str) -> str:
    """A gauge of a run, from the node of its newest start; labels but the node are kept."""
    labels = ", ".join(label for label in metric.labels if label != "node")
    starts = f"topk by (run) (1, {of(m.RUN_ATTEMPT_START_TIME, run)})"
    return f"max by ({labels}) ({of(metric, run, *matchers)} and on (run, node) {starts})"


def total(metric: Metric, run: str, *matchers: str) -> str:
    """A counter of a run since its first start, over all its starts; labels but the node are kept."""
    labels = ", ".join(label for label in metric.labels if label != "node")
    return f"max by ({labels}) ({of(metric, run, *matchers)})"


def goodput(run: str) -> str:
    """Share of productive seconds since the first start."""
    productive = total(m.RUN_WALL_SECONDS, run, is_("kind", "productive"))
    return f"sum by (run) ({productive}) / sum by (run) ({total(m.RUN_WALL_SECONDS, run)})"


def wall_share(run: str) -> str:
    """Share of the seconds of late that went to each kind."""
    seconds = rate(m.RUN_WALL_SECONDS, run)
    return f"sum by (run, kind) ({seconds}) / on (run) group_left () sum by (run) ({seconds})"


def state(run: str) -> str:
    """The number of the run's state: its place in ``STATES``, from 1."""
    each = (f"{number} * ({of(m.RUN_STATE, run, is_('state', name))} == 1)" for number, name in enumerate(STATES, start=1))
    return f"max by (run) ({' or '.join(each)})"
