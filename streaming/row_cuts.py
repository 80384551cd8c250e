"""Where rows end: documents laid end to end are cut into full rows at the ends of sentences and turns, or between documents.

Positions are tokens from the beginning of the first document. Pure; the loops here run once a row, not once a document.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]

BORDER_BUDGET = 0.004
"""Most rows that ends at borders may add, as a share of the fewest."""


@dataclass(frozen=True, eq=False)
class Borders:
    """Tokens at which a sentence or turn begins, of many documents: those of document d are
    ``tokens[first[d] : first[d + 1]]``, ascending, counted from its first token and never 0."""

    tokens: npt.NDArray[np.int32]
    first: Int64

    @classmethod
    def of(cls, counts: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> Borders:
        """``counts`` int32 [documents] and ``tokens`` int32 [sum of counts], as in ``document_table``."""
        return cls(tokens, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


@dataclass(frozen=True, eq=False)
class Cuts:
    """``at`` int64 [rows + 1]: row (or piece) r is tokens ``at[r]`` to ``at[r + 1]``. Of the ends of rows but the last,
    ``at_borders`` lie between documents or at a border."""

    at: Int64
    at_borders: int


def full_rows(order: Int64, ends: Int64, borders: Borders, length: int) -> Cuts:
    """Cuts of the documents ``order`` (numbers in ``borders``), which end at ``ends``, into rows of ``length`` tokens at most.

    A row ends at its last border (the beginning of a document is one too) where that leaves it more than half full and what all
    rows have given up stays within a budget, used evenly: what the last row lacks anyway, and ``BORDER_BUDGET`` of the fewest
    rows there can be, in whole rows. So 249 rows stay 249.
    """
    if not len(ends):
        return Cuts(np.zeros(1, np.int64), 0)
    total = int(ends[-1])
    fewest = -(-total // length)
    budget = (fewest + int(fewest * BORDER_BUDGET)) * length - total
    # Views whose items are Python's own integers, three times as fast one by one as numpy's.
    ends_, order_, tokens, first = ends.data, order.data, borders.tokens.data, borders.first.data
    cuts, start, place, given_up, at_borders = [0], 0, 0, 0, 0
    while total - start > length:
        stop = start + length
        place = bisect_left(ends_, stop, place, min(place + length, len(ends_)))
        if ends_[place] == stop:
            at_borders += 1
        else:
            document = order_[place]
            inside = stop - (ends_[place - 1] if place else 0)
            border = bisect_right(tokens, inside, first[document], first[document + 1]) - 1
            back = inside - (tokens[border] if border >= first[document] else 0)
            if 2 * back < length and (given_up + back) * total <= budget * stop:
                stop, given_up, at_borders = stop - back, given_up + back, at_borders + 1
        cuts.append(stop)
        start = stop
    cuts.append(total)
    return Cuts(np.array(cuts, np.int64), at_borders)


def whole_rows(ends: Int64, length: int) -> Int64:
    """Cuts of the fewest rows that hold whole documents in their order, int64 [rows + 1]; no document is longer than
    ``length``."""
    ends_ = ends.data
    cuts, place = [0], 0
    while place < len(ends_):
        place = bisect_right(ends_, cuts[-1] + length, place, min(place + length + 1, len(ends_)))
        cuts.append(ends_[place - 1])
    return np.array(cuts, np.int64)


def pieces(document: int, tokens: int, borders: Borders, length: int) -> Cuts:
    """Where a document of ``tokens`` tokens is divided into pieces, none longer than ``length``.

    A piece ends at the last border in its second half, or is full where there is none.
    """
    own = borders.tokens.data
    first, after = borders.first[document : document + 2].tolist()
    cuts, at_borders = [0], 0
    while tokens - cuts[-1] > length:
        stop = cuts[-1] + length
        border = bisect_right(own, stop, first, after) - 1
        if border >= first and own[border] > cuts[-1] + length // 2:
            stop, at_borders = own[border], at_borders + 1
        cuts.append(stop)
    return Cuts(np.array([*cuts, tokens], np.int64), at_borders)
