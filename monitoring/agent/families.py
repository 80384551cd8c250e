"""The answer to a scrape: samples of every source as families of prometheus_client, with name, kind and help of ``metrics``."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from outgrow.monitoring import metrics
from outgrow.monitoring.agent.samples import Sample, Source
from outgrow.monitoring.agent.scan import RunView
from outgrow.monitoring.metrics import METRICS, Metric
from outgrow.monitoring.recording.slots import STEP_BUCKETS_S

log = logging.getLogger(__name__)

Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_BOUNDS = (*(str(bound) for bound in STEP_BUCKETS_S), "+Inf")
_QUIET_S = 300.0
"""An error that stays is logged so often."""


class Collector:
    """Asks every source at each scrape. What one of them raises costs its own samples alone: it is counted and logged.

    ``runs`` gives the runs of this node as they are now. What prometheus_client wants of a registry is ``collect``.
    """

    def __init__(self, host: str, runs: Callable[[], Sequence[RunView]], sources: Sequence[Source]) -> None:
        self._host, self._runs, self._sources = host, runs, sources
        self._started = time.time()
        self._took_s = math.nan
        self._errors = Counter({source.part: 0 for source in sources})
        self._logged: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Family]:
        with self._lock:  # sources keep what they have shown: one scrape after the other
            begun = time.perf_counter()
            runs = self._runs()
            found = [sample for source in self._sources for sample in self._ask(source, runs)]
            found += self._of_agent(len(runs))
            answer = families(found)
            self._took_s = time.perf_counter() - begun
        return iter(answer)

    def _ask(self, source: Source, runs: Sequence[RunView]) -> Iterator[Sample]:
        try:
            yield from source.samples(runs)
        except Exception as error:  # whatever a driver, disk or record does: the others are served
            self._errors[source.part] += 1
            what = (source.part, f"{type(error).__name__}: {error}")
            now = time.monotonic()
            if now - self._logged.get(what, -math.inf) >= _QUIET_S:
                self._logged = {key: when for key, when in self._logged.items() if now - when < _QUIET_S} | {what: now}
                log.warning("%s could not be read", source.part, exc_info=error)

    def _of_agent(self, num_runs: int) -> Iterator[Sample]:
        node = (self._host,)
        yield Sample(metrics.AGENT_START_TIME, node, self._started)
        yield Sample(metrics.AGENT_SCRAPE_SECONDS, node, self._took_s)
        yield Sample(metrics.AGENT_RUNS, node, num_runs)
        for part, count in self._errors.items():
            yield Sample(metrics.AGENT_ERRORS, (self._host, part), count)


def families(samples: Iterable[Sample]) -> list[Family]:
    """One family for each metric that has a value, in the order of ``METRICS``. NaN is no value; of two samples with the same
    labels the later one holds, as Prometheus takes a scrape with both for broken."""
    by_metric: dict[str, dict[tuple[str, ...], Sample]] = {}
    for sample in samples:
        if not math.isnan(sample.value):
            by_metric.setdefault(sample.metric.name, {})[tuple(map(_encodable, sample.labels))] = sample
    return [_family(METRICS[name], by_metric[name]) for name in METRICS if name in by_metric]


def _encodable(label: str) -> str:
    """A value that UTF-8 can hold: a single one that it cannot would spoil the whole answer."""
    return label if label.isascii() else label.encode(errors="replace").decode()


def _family(metric: Metric, samples: Mapping[tuple[str, ...], Sample]) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, sample in samples.items():
            buckets = list(zip(_BOUNDS, sample.buckets, strict=True))
            histogram.add_metric(labels, buckets=buckets, sum_value=sample.value)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(metric.name, metric.help, labels=metric.labels)
    for labels, sample in samples.items():
        family.add_metric(labels, sample.value)
    return family
