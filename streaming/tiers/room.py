"""How the bytes of a slot are divided: shards that validation reads, planned shards, and room to read ahead.

A window is what is shuffled together, so each of its shards is needed at once; the cache holds at least the largest window of
every stream. A fetch may run while what it replaces is still read where there is more: a window's worth, or, in a large cache,
up to two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.streaming.rows import RowIndex, StreamRows
from outgrow.streaming.sampler import validation_rows
from outgrow.streaming.tiers.shard_list import ShardList

Int64: TypeAlias = npt.NDArray[np.int64]

_AHEAD_SHARE = 4
"""Of a large cache, a fourth at most is for reading ahead ..."""
_AHEAD_WINDOWS = 2
"""... and no more than so many windows."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes of a slot: ``total``, of which ``pinned`` are for shards that stay, ``planned`` for those that the schedule keeps,
    and ``ahead`` for fetches that run while what they replace is still read. ``smallest`` is the least total."""

    total: int
    pinned: int
    planned: int
    ahead: int
    smallest: int

    @classmethod
    def divide(cls, total: int, shards: ShardList, windows: Int64, pinned: Collection[int]) -> Self:
        """``total`` bytes for the shards of ``shards``, numbered in ``windows`` as ``number_windows`` does, of which those of
        ``pinned`` stay. Where it is less than ``smallest``, all that is not pinned is planned."""
        kept = int(shards.num_bytes[sorted(pinned)].sum())
        window, every = _largest_windows(shards, windows), int(shards.num_bytes[_training(shards)].sum())
        free = max(total - kept, 0)
        wanted = max(window, min(free // _AHEAD_SHARE, _AHEAD_WINDOWS * window))
        ahead = 0 if free >= every else max(min(wanted, free - window), 0)
        return cls(total=total, pinned=kept, planned=free - ahead, ahead=ahead, smallest=kept + window)

    @property
    def unpinned(self) -> int:
        """What planned and running fetches may take together."""
        return self.planned + self.ahead

    def check(self, where: str) -> None:
        """Raises ``DataError`` where there is less than the smallest cache; ``where`` says what gave the total."""
        if self.total < self.smallest:
            window = self.smallest - self.pinned
            raise DataError(
                f"the cache for shards has {self.total:,} bytes; the smallest that works has {self.smallest:,}: {window:,} for "
                f"the shards that are shuffled together, and {self.pinned:,} for those that validation reads",
                where=where,
                hint="give it as much, or lower data.window_shards: fewer shards are shuffled together then",
            )


def number_windows(shards: ShardList, window_shards: int) -> Int64:
    """The number of each shard's window, int64 [shards], over all streams and splits: ``window_shards`` neighbours each."""
    counts = np.diff(shards.ends, prepend=0)
    firsts = np.cumsum([0, *(-(-counts // window_shards))])[:-1]
    within = np.arange(len(shards)) - np.repeat(shards.ends - counts, counts)
    numbers: Int64 = np.repeat(firsts, counts) + within // window_shards
    return numbers


def validation_shards(index: RowIndex, shards: ShardList, max_rows: int) -> tuple[int, ...]:
    """The shards that validation reads, at most ``max_rows`` rows of each stream (0: all), in the order of their numbers."""
    found: set[int] = set()
    for number, stream in enumerate(index.streams("validation")):
        first, ends = shards.numbers(number, "validation").start, shards.documents(number, "validation")
        documents = np.fromiter(_documents(stream, max_rows), np.int64)
        found.update((first + np.unique(np.searchsorted(ends, documents, "right"))).tolist())
    return tuple(sorted(found))


def _documents(stream: StreamRows, max_rows: int) -> Iterator[int]:
    for row in validation_rows(stream, max_rows):
        yield from (span.document for span in stream.spans(row))


def _training(shards: ShardList) -> slice:
    """The shards of the training splits, which come first."""
    return slice(0, int(shards.ends[len(shards.streams) - 1]))


def _largest_windows(shards: ShardList, windows: Int64) -> int:
    """Bytes of the largest window of each stream's training split, together."""
    sizes = np.bincount(windows, shards.num_bytes, minlength=1).astype(np.int64)
    own = [windows[list(shards.numbers(stream, "train"))] for stream in range(len(shards.streams))]
    return sum(int(sizes[numbers].max()) for numbers in own if len(numbers))
