"""Which rows make up each optimizer step: a pure function of row index, seed and global batch.

Nothing here knows of ranks, nodes, loader workers or restarts, so the ordered list of a step is the same wherever it is asked
for. Each row comes once an epoch; the last step of an epoch holds what is left and may be short.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outgrow.streaming.rows import RowIndex, StreamRows
from outgrow.streaming.shuffle import permutation, sort_keys

Int64 = npt.NDArray[np.int64]


def epoch_order(index: RowIndex, seed: int, epoch: int) -> Int64:
    """All training rows in the order of one epoch, int64 [rows].

    In each stream the windows are shuffled, and the rows inside a window; then the streams are merged by how far along each is,
    so that every stretch has the mix of the whole, and each stream is still read window by window.
    """
    firsts = index.first_rows("train")
    rows = [first + _stream_order(stream, seed, epoch) for stream, first in zip(index.train, firsts[:-1], strict=True)]
    places = [(np.arange(len(own)) + 0.5) / max(len(own), 1) for own in rows]
    merged = np.argsort(np.concatenate([np.empty(0), *places]), kind="stable")
    order: Int64 = np.concatenate([np.empty(0, np.int64), *rows])[merged]
    return order


def _stream_order(stream: StreamRows, seed: int, epoch: int) -> Int64:
    windows = len(stream.window_rows) - 1
    place_of_window = np.argsort(permutation(windows, "windows", seed, stream.name, epoch))
    window_of_row = np.repeat(np.arange(windows), np.diff(stream.window_rows))
    keys = sort_keys(stream.num_rows, "rows", seed, stream.name, epoch)
    order: Int64 = np.lexsort((keys, place_of_window[window_of_row]))
    return order


class Sampler:
    """The rows of each step; keeps the order of one epoch, 8 bytes a row."""

    def __init__(self, index: RowIndex, *, seed: int, global_rows: int) -> None:
        self.index = index
        self.seed = seed
        self.global_rows = global_rows
        self.steps_per_epoch = -(-index.facts.rows // global_rows)
        self._epoch = -1
        self._order: Int64 = np.empty(0, np.int64)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def row_ids(self, step: int) -> tuple[int, ...]:
        """The ordered rows of optimizer step ``step`` (from 0) over all ranks; ``global_rows`` of them, fewer at an epoch's
        end."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.index, self.seed, epoch)
        start = within * self.global_rows
        return tuple(self._order[start : start + self.global_rows].tolist())


def validation_rows(stream: StreamRows, max_rows: int) -> tuple[int, ...]:
    """Rows of one stream that validation reads, the same every time: all, or ``max_rows`` (0: no limit) spread evenly over
    it."""
    count = stream.num_rows if max_rows == 0 else min(max_rows, stream.num_rows)
    return tuple(place * stream.num_rows // count for place in range(count))
