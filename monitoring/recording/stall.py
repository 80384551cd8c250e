"""When a step counts as stalled. Pure, and one rule for all: the rank's own account, the agent, and what is done about it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from outgrow.monitoring.recording.slots import RECENT_STEPS

TIMES_MEDIAN = 5.0
BETWEEN_STEPS_S = 600.0
"""What goes on between steps (a model is filled, a checkpoint copied, held-out rows read) is stalled after this long at the
soonest."""


def recent_steps(record: Mapping[str, float]) -> list[float]:
    """The last step times in seconds, in no order."""
    count = record["recent_count"]
    return [record[f"recent.{number}"] for number in range(min(int(count), RECENT_STEPS))] if count == count else []


def median_step_s(record: Mapping[str, float]) -> float | None:
    """None before the first step."""
    recent = recent_steps(record)
    return median(recent) if recent else None


def stall_threshold_s(stall_after_s: float, median_s: float | None) -> float:
    """Seconds after which a step that is not finished is stalled: as the site says, or five times the median step."""
    return max(stall_after_s, TIMES_MEDIAN * (median_s or 0.0))
