"""A rank's record as a file of fixed size that is mapped into memory: the rank stores, others read, nobody waits.

The file is an array of float64: a format number, a sequence number, then ``COPIES`` of ``slots.SLOTS``. The writer changes
values of its own, puts them whole into the copy that is the oldest, and only then raises the sequence number, which says which
copy is the newest. So a reader has until the writer comes round again, and a writer that is killed half-way leaves what it said
before.
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

Slots: TypeAlias = "array.array[float]"

COPIES = 4
_FORMAT_AT, _SEQUENCE_AT, _FIRST = 0, 1, 2
_SIZE = len(SLOTS)
NUM_BYTES = 8 * (_FIRST + COPIES * _SIZE)
_HEAD_BYTES = 8 * _FIRST
_TRIES = 100


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.rec"


def rank_of(path: Path) -> int:
    """The rank of a record's path."""
    return int(path.stem.removeprefix("rank-"))


class RankFile:
    """The writer's side: one process alone opens a record so."""

    def __init__(self, path: Path | None, counters: Mapping[str, float]) -> None:
        """A new record that goes on from ``counters``; gauges are NaN. Without a ``path`` it lies in memory, unseen by others.

        Raises ``OSError``."""
        self.values: Slots = array.array("d", [counters.get(name, 0.0) for name in COUNTERS])
        """The slots, at ``INDEX[name]``; readers see a change once it is published."""
        self.values.extend([math.nan] * (_SIZE - len(COUNTERS)))
        content = array.array("d", [float(FORMAT), 0.0]) + self.values * COPIES
        self._map = mmap.mmap(-1, NUM_BYTES) if path is None else _made(path, content.tobytes())
        self._all = memoryview(self._map).cast("d")
        self._copies = [self._all[_FIRST + _SIZE * number : _FIRST + _SIZE * (number + 1)] for number in range(COPIES)]
        self._sequence = 0

    @contextmanager
    def writing(self) -> Iterator[Slots]:
        """The slots, for a change that readers see whole."""
        yield self.values
        self.publish()

    def publish(self) -> None:
        """Show readers the values as they are now."""
        self._sequence += 1
        self._copies[self._sequence % COPIES][:] = memoryview(self.values)
        self._all[_SEQUENCE_AT] = self._sequence

    def close(self) -> None:
        """Nothing can be published any more; the values stay."""
        for copy in self._copies:
            copy.release()
        self._all.release()
        self._map.close()


def _made(path: Path, content: bytes) -> mmap.mmap:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made whole aside: where the disk is full, it fails here and not later, in the middle of a step.
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), NUM_BYTES)


def read_record(path: Path) -> dict[str, float] | None:
    """Every slot by name; None where the file is gone, not whole, or of another version of outgrow."""
    try:
        with open(path, "rb", buffering=0) as file:
            found = _newest_copy(file.fileno())
    except OSError:
        return None
    return dict(zip(SLOTS, found, strict=True)) if found is not None else None


def _newest_copy(descriptor: int) -> Slots | None:
    for _ in range(_TRIES):
        # Three reads, each done before the next: within one, a processor copies in what order it likes.
        head, data, later = (os.pread(descriptor, size, 0) for size in (_HEAD_BYTES, NUM_BYTES + 1, _HEAD_BYTES))
        if (len(head), len(data), len(later)) != (_HEAD_BYTES, NUM_BYTES, _HEAD_BYTES):
            return None
        found, sequence = array.array("d", data), array.array("d", head)[_SEQUENCE_AT]
        if found[_FORMAT_AT] != FORMAT:
            return None
        # The copy is whole unless the writer may have come round to it while it was read.
        if array.array("d", later)[_SEQUENCE_AT] - sequence < COPIES - 1:
            first = _FIRST + _SIZE * (int(sequence) % COPIES)
            return found[first : first + _SIZE]
    return None


def counters_of(record: Mapping[str, float]) -> dict[str, float]:
    """What of a record goes on in the next start."""
    return {name: record[name] for name in COUNTERS}
