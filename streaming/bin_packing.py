"""Whole documents into the fewest rows: best-fit-decreasing over counts of lengths, and the bound that it is measured against.

Documents of one length are alike, and so are rows that were filled alike: both are kept as counts, so the cost follows the
number of different lengths and not that of documents (histogram packing: Krell et al. 2021, arXiv 2107.02027). Pure numpy.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Filled:
    """What a bin holds: ``times`` items of ``length`` beside all that ``below`` holds."""

    below: _Filled | None
    length: int
    times: int


def best_fit(lengths: Int64, capacity: int) -> Int64:
    """The bin of each item, int64 [items], numbered from 0; no bin holds more than ``capacity``.

    ``lengths`` int64 [items], each from 1 to ``capacity``. Items of one length take their places in the order of ``lengths``.
    """
    bins = _fill(np.bincount(lengths, minlength=1), capacity)
    return _dealt(lengths, bins)


def lower_bound(lengths: Int64, capacity: int) -> int:
    """Bins that any packing takes at least: the bound L2 of Martello and Toth (1990), at least the sum over the capacity.

    For every ``small``: items above ``capacity - small`` stand alone; those above half stand apart; what does not fit beside
    the latter, of items of at least ``small``, needs bins of its own.
    """
    counts = np.bincount(lengths, minlength=capacity + 1).astype(np.int64)
    items = np.concatenate([[0], np.cumsum(counts)])  # items[n]: items shorter than n
    total = np.concatenate([[0], np.cumsum(counts * np.arange(capacity + 1))])
    half = capacity // 2
    small = np.arange(half + 1)
    large = items[-1] - items[half + 1]
    room = (items[capacity - small + 1] - items[half + 1]) * capacity - (total[capacity - small + 1] - total[half + 1])
    excess = total[half + 1] - total[small] - room
    return int(large + max(0, int((-(-excess // capacity)).max())))


def _fill(counts: Int64, capacity: int) -> list[tuple[int, _Filled]]:
    """Bins as (how many, what each holds): the longest items first, each into the fullest bin that has room."""
    remaining = np.flatnonzero(counts)
    shortest = int(remaining[0]) if len(remaining) else 0
    open_bins: dict[int, list[tuple[int, _Filled]]] = {}
    rooms: list[int] = []  # the keys of open_bins in order
    done: list[tuple[int, _Filled]] = []

    def put(count: int, room: int, filled: _Filled) -> None:
        if room < shortest:
            done.append((count, filled))
        elif room in open_bins:
            open_bins[room].append((count, filled))
        else:
            open_bins[room] = [(count, filled)]
            insort(rooms, room)

    for length in remaining[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                number, room, below = left, capacity, None
            else:
                room = rooms[at]
                number, below = open_bins[room].pop()
                if not open_bins[room]:
                    del open_bins[room], rooms[at]
            times = room // length
            filled = min(number, left // times)
            if filled:
                put(filled, room - times * length, _Filled(below, length, times))
                left -= filled * times
            if filled < number:
                if left:  # fewer than fill one more of these bins
                    put(1, room - left * length, _Filled(below, length, left))
                    filled, left = filled + 1, 0
                if below is not None and filled < number:
                    put(number - filled, room, below)
    return done + [bins for same_room in open_bins.values() for bins in same_room]


def _dealt(lengths: Int64, bins: list[tuple[int, _Filled]]) -> Int64:
    """The bin of each item, where ``bins`` says what the bins hold."""
    parts: list[tuple[int, int, int, int]] = []  # length, times, first bin, bins
    first = 0
    for count, filled in bins:
        part: _Filled | None = filled
        while part is not None:
            parts.append((part.length, part.times, first, count))
            part = part.below
        first += count
    length, times, first_bin, count_of = np.array(parts, np.int64).reshape(-1, 4).T
    by_length = np.argsort(length, kind="stable")
    times, first_bin, places = times[by_length], first_bin[by_length], (times * count_of)[by_length]
    within = np.arange(places.sum()) - np.repeat(np.cumsum(places) - places, places)
    dealt = np.empty(len(lengths), np.int64)
    dealt[np.argsort(lengths, kind="stable")] = np.repeat(first_bin, places) + within // np.repeat(times, places)
    return dealt
