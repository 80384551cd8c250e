"""A sample of every declared metric for a run of an hour, as OpenMetrics text that promtool makes a database of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from outgrow.monitoring import metrics
from outgrow.monitoring.metrics import Metric
from outgrow.monitoring.recording.slots import CAUSES, PHASES, STAGES, STEP_BUCKETS_S, WALL

RUN, NODE = "demo", "box"
SECONDS, EVERY = 3600, 15

_VALUES: dict[str, tuple[str, ...]] = {
    "run": (RUN,),
    "node": (NODE,),
    "rank": ("0", "1"),
    "gpu": ("0",),
    "state": metrics.RUN_STATES,
    "phase": PHASES,
    "cause": CAUSES,
    "stage": STAGES,
    "result": ("committed", "failed"),
    "ceiling": ("vendor", "measured"),
    "mode": ("busy", "iowait", "idle"),
    "direction": ("received", "sent"),
    "reason": ("power", "thermal", "hardware", "brake", "sync"),
    "xid": ("79",),
    "tier": ("nvme",),
    "part": ("gpus",),
}
"""Values of labels that mean the same on every metric; others are given in ``_KINDS`` or have their own name as value."""
_KINDS = {
    metrics.RUN_TOKENS: ("valid", "padding"),
    metrics.RUN_WALL_SECONDS: WALL,
    metrics.RANK_MEMORY: ("allocated", "reserved", "peak", "anon", "file", "shmem"),
    metrics.TIER_ERRORS: ("timeout",),
    metrics.NODE_MEMORY: ("total", "available"),
    metrics.GPU_MEMORY: ("total", "used"),
}


def openmetrics(end: int) -> str:
    """Samples up to the Unix time ``end``: counters grow, gauges stand still but for times and steps."""
    lines = [line for metric in metrics.METRICS.values() for line in _samples(metric, end)]
    lines += [f'ALERTS{{alertname="{name}",alertstate="firing",run="{RUN}",severity="warning"}} 1 {at}'
              for name in ("OutgrowLossSpike", "OutgrowStalled") for at in _times(end)]  # fmt: skip
    return "\n".join([*lines, "# EOF", ""])


def _samples(metric: Metric, end: int) -> Iterator[str]:
    values = [_KINDS[metric] if label == "kind" else _VALUES.get(label, (label,)) for label in metric.labels]
    for number, labels in enumerate(itertools.product(*values)):
        text = ",".join(f'{name}="{value}"' for name, value in zip(metric.labels, labels, strict=True))
        if metric.kind == "histogram":
            yield from _histogram(metric, text, end)
        else:
            yield from (f"{metric.name}{{{text}}} {_value(metric, labels, number, at, end)} {at}" for at in _times(end))


def _value(metric: Metric, labels: tuple[str, ...], number: int, at: int, end: int) -> float:
    passed = at - (end - SECONDS)
    if metric.kind == "counter":
        return passed * (number + 1) / 10
    if metric is metrics.RUN_STATE:
        return float(labels[-1] == "running")
    if "timestamp" in metric.name:
        return at - 20
    if "start_time" in metric.name:
        return end - SECONDS
    return 1 + passed / 100 if metric.name.endswith("_step") else 1 + number


def _histogram(metric: Metric, labels: str, end: int) -> Iterator[str]:
    bounds = [*map(str, STEP_BUCKETS_S), "+Inf"]
    for at in _times(end):
        passed = at - (end - SECONDS)
        yield from (f'{metric.name}_bucket{{{labels},le="{bound}"}} {passed} {at}' for bound in bounds)
        yield f"{metric.name}_sum{{{labels}}} {passed * 0.04} {at}"
        yield f"{metric.name}_count{{{labels}}} {passed} {at}"


def _times(end: int) -> range:
    return range(end - SECONDS, end + 1, EVERY)
