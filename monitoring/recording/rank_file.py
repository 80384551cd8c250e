"""A rank's record as a file of fixed size that is mapped into memory: the rank stores, others read, nobody waits.

The file is one array of float64: a format number, a sequence number, then ``slots.SLOTS``. A writer makes the sequence
number odd, stores, and makes it even again; a reader takes a copy between two equal even ones. A writer that was killed
half-way leaves an odd number behind: what it left is read as it is.
"""

from __future__ import annotations

import array
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from outgrow.monitoring.recording.slots import COUNTERS, FORMAT, SLOTS

Slots: TypeAlias = "memoryview[float]"

_FORMAT_AT, _SEQUENCE_AT, _FIRST = 0, 1, 2
NUM_BYTES = 8 * (_FIRST + len(SLOTS))
_TRIES = 100


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.rec"


def rank_of(path: Path) -> int:
    """The rank of a record's path."""
    return int(path.stem.removeprefix("rank-"))


class RankFile:
    """The writer's side: one process alone opens a record so."""

    def __init__(self, path: Path, counters: Mapping[str, float]) -> None:
        """A new record that goes on from ``counters``; gauges are NaN. Raises ``OSError``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [counters.get(name, 0.0) for name in COUNTERS] + [math.nan] * (len(SLOTS) - len(COUNTERS))
        # Made whole aside: where the disk is full, it fails here and not later, in the middle of a step.
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_bytes(array.array("d", [float(FORMAT), 0.0, *values]).tobytes())
        aside.replace(path)
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), NUM_BYTES)
        self._all: Slots = memoryview(self._map).cast("d")
        self.values: Slots = self._all[_FIRST:]
        """The slots, at ``INDEX[name]``; store into them within ``writing`` alone."""

    @contextmanager
    def writing(self) -> Iterator[Slots]:
        """The slots, for a change that readers see whole."""
        self.begin()
        try:
            yield self.values
        finally:
            self.end()

    def begin(self) -> None:
        self._all[_SEQUENCE_AT] += 1.0

    def end(self) -> None:
        self._all[_SEQUENCE_AT] += 1.0

    def close(self) -> None:
        self.values.release()
        self._all.release()
        self._map.close()


def read_record(path: Path) -> dict[str, float] | None:
    """Every slot by name; None where the file is gone, not whole, or of another version of outgrow."""
    before = None
    for _ in range(_TRIES):
        before, after = _read(path), _read(path)
        if before is None or after is None:
            return None
        if before[_SEQUENCE_AT] == after[_SEQUENCE_AT] and before[_SEQUENCE_AT] % 2 == 0:
            break
    return dict(zip(SLOTS, before[_FIRST:], strict=True)) if before else None


def _read(path: Path) -> array.array[float] | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) != NUM_BYTES:
        return None
    found = array.array("d")
    found.frombytes(data)
    return found if found[_FORMAT_AT] == FORMAT else None


def counters_of(record: Mapping[str, float]) -> dict[str, float]:
    """What of a record goes on in the next start."""
    return {name: record[name] for name in COUNTERS}
