"""Counts of what is read of each place while shards are fetched, for several threads at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from outgrow.contracts import TierTraffic


@dataclass
class _Count:
    """One place: totals, and since when how many reads are under way."""

    shards: int = 0
    bytes: int = 0
    read_s: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    reading: int = 0
    since: float = 0.0


class Traffic:
    """Totals by the name of a place, going on from ``start``.

    ``read_s`` is the time in which at least one read of the place was under way, so that bytes by seconds is the rate of the
    place however many are read at once; waits for a rate limit and between attempts are not in it.
    """

    def __init__(self, start: Mapping[str, TierTraffic] | None = None) -> None:
        self._lock = threading.Lock()
        self._counts = {
            name: _Count(then.shards, then.bytes, then.read_s, dict(then.errors)) for name, then in (start or {}).items()
        }

    @contextmanager
    def reading(self, place: str) -> Iterator[None]:
        """The time that a read takes."""
        with self._lock:
            count = self._count(place)
            if not count.reading:
                count.since = time.monotonic()
            count.reading += 1
        try:
            yield
        finally:
            with self._lock:
                count.reading -= 1
                if not count.reading:
                    count.read_s += time.monotonic() - count.since

    def bytes_read(self, place: str, num_bytes: int) -> None:
        with self._lock:
            self._count(place).bytes += num_bytes

    def shard_read(self, place: str) -> None:
        """One more whole shard."""
        with self._lock:
            self._count(place).shards += 1

    def failed(self, place: str, kind: str) -> None:
        """One more error of a kind that ``retry.kind_of`` names."""
        with self._lock:
            errors = self._count(place).errors
            errors[kind] = errors.get(kind, 0) + 1

    def snapshot(self) -> dict[str, TierTraffic]:
        with self._lock:
            return {
                name: TierTraffic(shards=count.shards, bytes=count.bytes, read_s=count.read_s, errors=dict(count.errors))
                for name, count in self._counts.items()
            }

    def _count(self, place: str) -> _Count:
        return self._counts.setdefault(place, _Count())
