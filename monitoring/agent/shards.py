"""What reading shards through tiers costs, as the process that reads them writes it down beside its cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from outgrow.contracts import ShardCounts, TierTraffic
from outgrow.monitoring import metrics
from outgrow.monitoring.agent.background import Background
from outgrow.monitoring.agent.samples import Sample

if TYPE_CHECKING:
    from outgrow.monitoring.agent.scan import RunView

MAX_BYTES = 1 << 20
WAIT_S = 0.05
MAX_AGE_S = 120.0
"""What a disk gave longer ago, and has not since, is not shown."""

_FIELDS = (
    (metrics.CACHE_HITS, "hits"),
    (metrics.CACHE_MISSES, "misses"),
    (metrics.CACHE_FETCHES, "fetches"),
    (metrics.CACHE_REFETCHES, "refetches"),
    (metrics.CACHE_EVICTIONS, "evictions"),
    (metrics.CACHE_HEALED, "healed"),
    (metrics.CACHE_READ_THROUGH, "read_through"),
    (metrics.CACHE_BYTES, "cache_bytes"),
    (metrics.CACHE_ROOM, "room_bytes"),
    (metrics.CACHE_QUEUE, "queue"),
    (metrics.CACHE_WAIT_SECONDS, "wait_s"),
)
_TIER_FIELDS = (
    (metrics.TIER_SHARDS, "shards"),
    (metrics.TIER_BYTES, "bytes"),
    (metrics.TIER_READ_SECONDS, "read_s"),
)


def read_shard_counts(path: str) -> ShardCounts | None:
    """None where nothing is written yet, or not by this version, or the first tier is gone."""
    try:
        with open(path, "rb") as file:
            counts = ShardCounts.from_dict(json.loads(file.read(MAX_BYTES)))
        return counts if _is_counts(counts) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_counts(counts: ShardCounts) -> bool:
    """Whether all of it are numbers: ``from_dict`` checks names alone."""
    traffic = list(counts.tiers.values())
    values = [getattr(counts, name) for _, name in _FIELDS]
    values += [getattr(one, name) for one in traffic for _, name in _TIER_FIELDS]
    values += [value for one in traffic for value in one.errors.values()]
    return all(isinstance(value, (int, float)) for value in values)


class ShardsSource:
    """Tiers and cache of every run that has such counts, after its end too, for as long as the run is shown."""

    part = "shards"

    def __init__(self) -> None:
        self._files: dict[str, Background[ShardCounts | None]] = {}

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        files = {run.facts.shard_counts for run in runs} - {""}
        self._files = {path: self._files.get(path) or _reader(path) for path in files}
        for run in runs:
            file = self._files.get(run.facts.shard_counts)
            reading = file.get(WAIT_S) if file is not None else None
            counts = reading.value if reading is not None and reading.age_s <= MAX_AGE_S else None
            # Another run may have taken over the cache of one that has ended.
            if counts is not None and counts.run == run.facts.run:
                yield from _samples((run.facts.run, run.facts.host), counts)


def _reader(path: str) -> Background[ShardCounts | None]:
    return Background(_File(path).read, name="shard-counts")


class _File:
    """Reads a file that is replaced whole only where it has been replaced: those of ended runs stay as they are."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._which: tuple[int, ...] = ()
        self._counts: ShardCounts | None = None

    def read(self) -> ShardCounts | None:
        try:
            about = os.stat(self._path)
        except OSError:
            return None
        which = (about.st_ino, about.st_mtime_ns, about.st_size)
        if which != self._which:
            self._counts, self._which = read_shard_counts(self._path), which
        return self._counts


def _samples(run: tuple[str, str], counts: ShardCounts) -> Iterator[Sample]:
    for metric, name in _FIELDS:
        yield Sample(metric, run, getattr(counts, name))
    for tier, traffic in counts.tiers.items():
        yield from _tier_samples((*run, tier), traffic)


def _tier_samples(labels: tuple[str, str, str], traffic: TierTraffic) -> Iterator[Sample]:
    for metric, name in _TIER_FIELDS:
        yield Sample(metric, labels, getattr(traffic, name))
    for kind, number in traffic.errors.items():
        yield Sample(metrics.TIER_ERRORS, (*labels, kind), number)
