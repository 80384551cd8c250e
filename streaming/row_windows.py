"""One window of rows: which tokens of which documents lie in each row, and the loss weights that a row sums to.

The documents of a window, or pieces of those that are too long, lie end to end in ``order``; ``cuts`` divides them into rows. A
window is laid by itself from its documents, and kept and read by itself, as one blob.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from outgrow.streaming.bin_packing import best_fit, lower_bound
from outgrow.streaming.row_cuts import full_rows, pieces, whole_rows
from outgrow.streaming.window_documents import WindowDocuments

Int64: TypeAlias = npt.NDArray[np.int64]
UInt32: TypeAlias = npt.NDArray[np.uint32]
Float64: TypeAlias = npt.NDArray[np.float64]


class Span(NamedTuple):
    """``length`` tokens of a document from token ``start`` on; ``document`` counts the samples of the stream's MDS folder."""

    document: int
    start: int
    length: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Window:
    """R rows of P documents or pieces of documents.

    first    number of the window's first document in the split
    order    uint32 [P]       the document at each place, counted from ``first``
    starts   uint32 [P]       the token of the document that each piece begins with; empty where all documents are whole
    ends     int64 [P]        tokens up to and including each place
    cuts     int64 [R + 1]    row r is tokens ``cuts[r]`` to ``cuts[r + 1]``; only a row that was given up is empty
    weights  float64 [R]      sum of the loss weights of each row's targets
    """

    first: int
    order: UInt32
    starts: UInt32
    ends: Int64
    cuts: Int64
    weights: Float64

    @property
    def num_rows(self) -> int:
        return len(self.weights)

    @property
    def num_tokens(self) -> int:
        return int(self.cuts[-1])

    def spans(self, row: int) -> list[Span]:
        """What lies in a row of this window, in order."""
        start, stop = self.cuts[row : row + 2].tolist()
        if start == stop:
            return []
        first = int(np.searchsorted(self.ends, start, "right"))
        last = int(np.searchsorted(self.ends, stop, "left")) + 1
        ends = [int(self.ends[first - 1]) if first else 0, *self.ends[first:last].tolist()]
        starts = self.starts[first:last].tolist() or [0] * (last - first)
        return [
            Span(self.first + document, piece + max(start, begin) - begin, min(stop, end) - max(start, begin))
            for document, piece, begin, end in zip(self.order[first:last].tolist(), starts, ends[:-1], ends[1:], strict=True)
        ]

    def without(self, documents: Sequence[range]) -> Self:
        """The window with every row empty that holds a token of ``documents`` (numbers in the split).

        Rows keep their numbers, and those that are left their spans and weights; an empty row weighs nothing. A document that
        lies in several rows has a place for each row then.
        """
        begins = np.concatenate([[0], self.ends[:-1]])
        stretches = np.union1d(self.cuts, self.ends)  # each lies in one place and in one row
        at, lengths = stretches[:-1], np.diff(stretches)
        place, row = np.searchsorted(self.ends, at, "right"), _rows_of(self.cuts, at)
        document = self.first + self.order[place].astype(np.int64)
        is_empty = np.zeros(self.num_rows, bool)
        for own in documents:
            is_empty[row[(document >= own.start) & (document < own.stop)]] = True
        if not is_empty.any():
            return self
        starts = at - begins[place] + (self.starts[place] if len(self.starts) else 0)
        kept = ~is_empty[row]
        row_tokens = np.where(is_empty, 0, np.diff(self.cuts))
        return replace(
            self,
            order=self.order[place[kept]],
            starts=starts[kept].astype(np.uint32),
            ends=np.cumsum(lengths[kept], dtype=np.int64),
            cuts=np.concatenate([[0], np.cumsum(row_tokens, dtype=np.int64)]),
            weights=np.where(is_empty, 0.0, self.weights),
        )

    def encode(self) -> bytes:
        """The window as one blob, safetensors."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "first": np.array([self.first], np.int64),
            "order": self.order,
            "starts": self.starts,
            "lengths": np.diff(self.ends, prepend=0).astype(np.uint32),
            "row_tokens": np.diff(self.cuts).astype(np.uint32),
            "weights": self.weights,
        }
        return save(arrays)

    @classmethod
    def decode(cls, blob: bytes) -> Self:
        """The window that ``encode`` wrote; the blob's digest was checked before."""
        arrays = load(blob)
        return cls(
            first=int(arrays["first"][0]),
            order=arrays["order"],
            starts=arrays["starts"],
            ends=np.cumsum(arrays["lengths"], dtype=np.int64),
            cuts=np.concatenate([[0], np.cumsum(arrays["row_tokens"], dtype=np.int64)]),
            weights=arrays["weights"],
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Laid:
    """A window that was laid; a lower bound of its rows, whatever the way of packing it (in its order where that is kept); and
    how many of its rows' ends, but for the last, lie between documents or at the end of a sentence or turn."""

    window: Window
    fewest_rows: int
    cuts_at_borders: int


def lay(documents: WindowDocuments, order: Int64, length: int, *, whole: bool, sequential: bool) -> Laid:
    """Rows of at most ``length`` tokens of the documents ``order`` (numbers in the window), each of its tokens in one row.

    ``whole`` keeps documents whole (one longer than a row is laid in pieces), else rows are full; ``sequential`` keeps their
    order. Weights are those of documents whose weights are all 1; ``weigh`` corrects the others.
    """
    if not whole:
        ends = np.cumsum(documents.lengths[order], dtype=np.int64)
        cuts = full_rows(order, ends, documents.borders, length)
        window = _window(documents, order, np.empty(0, np.int64), ends, cuts.at)
        return Laid(window=window, fewest_rows=-(-window.num_tokens // length), cuts_at_borders=cuts.at_borders)
    order, starts, lengths, loose = _in_pieces(documents, order, length)
    if sequential:
        at = whole_rows(np.cumsum(lengths, dtype=np.int64), length)
        fewest = len(at) - 1
    else:
        places, row_tokens = _packed(lengths, length)
        order, starts, lengths = order[places], starts[places] if len(starts) else starts, lengths[places]
        at = np.concatenate([[0], np.cumsum(row_tokens)])
        fewest = lower_bound(lengths, length)
    window = _window(documents, order, starts, np.cumsum(lengths, dtype=np.int64), at)
    # A piece that ends within a sentence fills a row of its own; the end of the last row is no cut.
    loose -= len(starts) > 0 and _is_loose(documents, int(order[-1]), int(starts[-1] + lengths[-1]))
    return Laid(window=window, fewest_rows=fewest, cuts_at_borders=max(window.num_rows - 1, 0) - loose)


def _is_loose(documents: WindowDocuments, document: int, end: int) -> bool:
    """Whether a piece that ends before token ``end`` of a document ends within a sentence or turn."""
    first, after = documents.borders.first[document : document + 2].tolist()
    return end < int(documents.lengths[document]) and end not in documents.borders.tokens[first:after].tolist()


def _in_pieces(documents: WindowDocuments, order: Int64, length: int) -> tuple[Int64, Int64, Int64, int]:
    """The documents ``order`` with those longer than ``length`` in pieces: document, start and length of each, and how many
    pieces end within a sentence. Starts are empty where every document is whole."""
    lengths = documents.lengths[order]
    long = np.flatnonzero(lengths > length)
    if not len(long):
        return order, np.empty(0, np.int64), lengths, 0
    cut = [pieces(int(order[at]), int(lengths[at]), documents.borders, length) for at in long.tolist()]
    counts = np.ones(len(order), np.int64)
    counts[long] = [len(own.at) - 1 for own in cut]
    of_long = np.repeat(lengths > length, counts)
    starts, piece_lengths = np.zeros(len(of_long), np.int64), np.repeat(lengths, counts)
    starts[of_long] = np.concatenate([own.at[:-1] for own in cut])
    piece_lengths[of_long] = np.concatenate([np.diff(own.at) for own in cut])
    loose = int((counts - 1).sum()) - sum(own.at_borders for own in cut)
    return np.repeat(order, counts), starts, piece_lengths, loose


def _packed(lengths: Int64, length: int) -> tuple[Int64, Int64]:
    """Places in the order of their rows, and tokens of each row; rows come in the order of their first place."""
    rows = best_fit(lengths, length)
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    first = np.full(num_rows, len(rows), np.int64)
    np.minimum.at(first, rows, np.arange(len(rows)))
    row_tokens = np.bincount(rows, lengths, num_rows).astype(np.int64)
    return np.argsort(first[rows], kind="stable"), row_tokens[np.argsort(first)]


def _window(documents: WindowDocuments, order: Int64, starts: Int64, ends: Int64, cuts: Int64) -> Window:
    """The window with the number of targets in each row as its weight: its tokens less the documents that end in it."""
    lengths = np.diff(ends, prepend=0)
    last = (starts if len(starts) else 0) + lengths == documents.lengths[order]
    targets = np.diff(cuts) - np.bincount(_rows_of(cuts, ends[last] - 1), minlength=len(cuts) - 1)
    return Window(
        first=documents.first,
        order=order.astype(np.uint32),
        starts=starts.astype(np.uint32),
        ends=ends,
        cuts=cuts,
        weights=targets.astype(np.float64),
    )


def weigh(window: Window, documents: WindowDocuments, read: Callable[[int], npt.NDArray[np.float32] | None]) -> Window:
    """The window with the weights of documents whose weights are not all 1; ``read`` gives the loss weight of every token of a
    document (numbered in its split), and is called for those alone that lie in more than one row."""
    weighted = ~documents.plain[window.order]
    if not weighted.any():
        return window
    begins = np.concatenate([[0], window.ends[:-1]])
    row, last_row = _rows_of(window.cuts, begins), _rows_of(window.cuts, window.ends - 1)
    lengths = documents.lengths[window.order]
    is_whole = weighted & (row == last_row) & (window.ends - begins == lengths)
    surplus = documents.weight[window.order] - (lengths - 1)
    weights = window.weights + np.bincount(row[is_whole], surplus[is_whole], window.num_rows)
    divided = np.flatnonzero(weighted & ~is_whole)
    for place in divided[np.argsort(window.order[divided], kind="stable")].tolist():  # in the order of the shards
        own = read(documents.first + int(window.order[place]))
        assert own is not None, "the document table says that the weights are not uniform"
        start = int(window.starts[place]) if len(window.starts) else 0
        targets = own[start + 1 : start + 1 + int(window.ends[place] - begins[place])]
        more = np.zeros(window.ends[place] - begins[place])  # 0 for the last token of a document, which has no target
        more[: len(targets)] = targets.astype(np.float64) - 1
        rows = slice(row[place], last_row[place] + 1)
        weights[rows] += np.add.reduceat(more, np.maximum(window.cuts[rows] - begins[place], 0))
    return replace(window, weights=weights)


def _rows_of(cuts: Int64, tokens: Int64) -> Int64:
    """The row of each token, counted from the window's first."""
    return np.searchsorted(cuts, tokens, "right") - 1
