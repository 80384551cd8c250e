"""The page of all metrics, made from their declarations: ``python -m outgrow.monitoring.metrics_page`` rewrites it in docs/.

A test fails when it is stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from outgrow.monitoring import metrics
from outgrow.monitoring.agent.nvml import THROTTLE_REASONS
from outgrow.monitoring.metrics import METRICS, Metric
from outgrow.monitoring.recording.slots import CAUSES, PHASES, STAGES, STEP_BUCKETS_S, WALL

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"

_INTRODUCTION = """\
What the node agent serves at `/metrics`, port `monitoring.agent_port` of the site (9640), for every run of its node. Units are
seconds, bytes, watts, degrees Celsius and ratios from 0 to 1. Names with `_total` are counters: those of a run and of its ranks
go on across its restarts. A value that nothing has told yet is left out; a zero is one that was counted."""

_SECTIONS = (
    ("A run", ("run",), "Told by the node that has rank 0, for the whole run."),
    ("A rank", ("rank",), "Told by the node that the rank is on."),
    ("Tiers and cache", ("tier", "cache"), "Where a run's data is read through tiers; counted on each node for itself."),
    ("A node and its GPUs", ("node", "gpu"), "GPUs where the node has an NVIDIA driver."),
    ("The agent", ("agent",), "What the node agent says of itself."),
)
_LABELS = {
    "run": "the run folder's own name",
    "node": "host name of the node",
    "rank": "number of the rank, from 0",
    "tier": "name of the tier in `site.yaml`",
    "gpu": "number of the GPU as NVML counts, from 0",
    "xid": "number of the error in NVIDIA's list of XID errors",
    "part": "what could not be read: the agent's source",
}
_VALUES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("state", "outgrow_run_state", metrics.RUN_STATES),
    ("kind", "outgrow_run_wall_seconds_total", WALL),
    ("cause", "outgrow_run_restarts_total", CAUSES),
    ("stage", "outgrow_run_checkpoint_seconds_total", STAGES),
    ("phase", "outgrow_rank_phase_seconds_total", PHASES),
    ("reason", "outgrow_gpu_throttled", tuple(THROTTLE_REASONS)),
)


def page() -> str:
    """The whole page as Markdown."""
    made = "<!-- made by python -m outgrow.monitoring.metrics_page; change monitoring/metrics.py instead -->"
    return "\n".join([made, "", "# Metrics", "", _INTRODUCTION, *_tables(), *_labels()]) + "\n"


def _tables() -> Iterator[str]:
    for title, subjects, text in _SECTIONS:
        yield from ("", f"## {title}", "", text, "", "| metric | kind | labels | meaning |", "|---|---|---|---|")
        for metric in METRICS.values():
            if _subject(metric) in subjects:
                labels = " ".join(f"`{label}`" for label in metric.labels)
                yield f"| `{metric.name}` | {metric.kind} | {labels} | {_meaning(metric)} |"


def _subject(metric: Metric) -> str:
    return metric.name.split("_")[1]


def _meaning(metric: Metric) -> str:
    if metric.kind == "histogram":
        return f"{metric.help} Buckets end at {', '.join(f'{bound:g}' for bound in STEP_BUCKETS_S)} s."
    return metric.help


def _labels() -> Iterator[str]:
    yield from ("", "## Labels", "", "| label | of | values |", "|---|---|---|")
    for label, text in _LABELS.items():
        yield f"| `{label}` | | {text} |"
    for label, metric, values in _VALUES:
        yield f"| `{label}` | `{metric}` | {', '.join(values)} |"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
