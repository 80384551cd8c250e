"""One value of a metric, and the sources of values that the agent asks at every scrape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from outgrow.monitoring.metrics import Metric

if TYPE_CHECKING:
    from outgrow.monitoring.agent.scan import RunView


@dataclass(frozen=True, slots=True)
class Sample:
    """``labels`` are values in the order of ``metric.labels``. Of a histogram ``value`` is the sum, and ``buckets`` are the
    cumulative counts, the last without a bound."""

    metric: Metric
    labels: tuple[str, ...]
    value: float
    buckets: tuple[float, ...] = ()


class Source(Protocol):
    """Values of one kind; what it raises is counted under ``part`` and costs its own samples alone."""

    part: str

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        """What is known now; ``runs`` are those of this node. NaN values are left out by the caller."""
