"""Which rows make up each optimizer step: a pure function of row indexes, mix and seed.

Nothing here knows of ranks, nodes, loader workers or restarts, so the ordered list of a step is the same wherever it is asked
for. ``recipes.mix`` says how many rows of each stream have come before a step; here a place in a stream's endless sequence of
passes becomes a row. In a pass the windows are shuffled, and the rows inside a window when the pass comes to it; a sequential
stream keeps its order. So a stream is read window by window, and no array is as long as a stream has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from outgrow.recipes.mix import Mix, Phase
from outgrow.streaming.rows import RowIndex, StreamRows
from outgrow.streaming.shuffle import permutation

Int64 = npt.NDArray[np.int64]

_PASSES_KEPT = 2
"""A step that ends one pass begins the next."""
_WINDOWS_KEPT = 4


class StreamOrder:
    """The rows of one stream, pass after pass; keeps the order of the windows of a pass or two, and of a few windows' rows."""

    def __init__(self, stream: StreamRows, seed: int) -> None:
        self._stream = stream
        self._seed = seed
        self._windows = lru_cache(_PASSES_KEPT)(self._order_of_windows)
        self._rows = lru_cache(_WINDOWS_KEPT)(self._order_within)

    def row(self, place: int) -> int:
        """The row at ``place`` of the endless sequence of passes."""
        number, within = divmod(place, self._stream.num_rows)
        if self._stream.sequential:
            return within
        windows, ends = self._windows(number)
        turn = int(np.searchsorted(ends, within, "right"))
        rows = self._rows(number, int(windows[turn]))
        return int(rows[within - int(ends[turn])])  # counted from the window's end

    def windows(self, number: int) -> tuple[Int64, Int64]:
        """The windows of a pass in order, int64 [windows], and how many of the pass's rows have gone by at the end of each."""
        return self._windows(number)

    def rows(self, number: int, window: int) -> Int64:
        """The rows of a window in the order of pass ``number``, int64."""
        return self._rows(number, window)

    def _order_of_windows(self, number: int) -> tuple[Int64, Int64]:
        starts = self._stream.window_rows
        if self._stream.sequential:
            return np.arange(len(starts) - 1), starts[1:]
        order = permutation(len(starts) - 1, "windows", self._seed, self._stream.name, number)
        return order, np.cumsum(np.diff(starts)[order])

    def _order_within(self, number: int, window: int) -> Int64:
        first, after = self._stream.window_rows[window : window + 2].tolist()
        if self._stream.sequential:
            return np.arange(first, after)
        order: Int64 = first + permutation(after - first, "rows", self._seed, self._stream.name, number, skip=first)
        return order


class Sampler:
    """The rows of each step. ``indexes`` are opened, in the order of the card that ``mix`` was made of."""

    def __init__(self, indexes: Sequence[RowIndex], mix: Mix, seed: int) -> None:
        self.mix = mix
        self._orders = [[StreamOrder(stream, seed) for stream in index.streams("train")] for index in indexes]
        self._first_rows = [index.first_rows("train").tolist() for index in indexes]
        for index in indexes:
            names = tuple(stream.name for stream in index.streams("train"))
            assert names == mix.streams, "an index of other streams than the card's"

    def phase(self, step: int) -> Phase:
        """The epoch or stage of a step; its ``index`` is the one that the step's rows are numbered in."""
        return self.mix.phase(step)

    def row_ids(self, step: int) -> tuple[int, ...]:
        """The ordered rows of optimizer step ``step`` (from 0) over all ranks; fewer at an epoch's end."""
        index = self.mix.phase(step).index
        orders, firsts = self._orders[index], self._first_rows[index]
        return tuple(firsts[stream] + orders[stream].row(place) for stream, place in self.mix.rows(step))


def validation_rows(stream: StreamRows, max_rows: int) -> tuple[int, ...]:
    """Rows of one stream that validation reads, the same every time: all, or ``max_rows`` (0: no limit) spread evenly over
    it."""
    count = stream.num_rows if max_rows == 0 else min(max_rows, stream.num_rows)
    return tuple(place * stream.num_rows // count for place in range(count))
