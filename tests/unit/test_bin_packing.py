"""Whole documents in rows: as good as packing them one by one, and near the best that can be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import lengths
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.streaming.bin_packing import best_fit, lower_bound

Items = st.integers(1, 40).flatmap(lambda size: st.tuples(st.lists(st.integers(1, size), max_size=60), st.just(size)))


def twin_best_fit(items: list[int], capacity: int) -> list[int]:
    """What each bin holds when the items are taken one by one, the longest first, each into the fullest bin with room."""
    bins: list[int] = []
    for item in sorted(items, reverse=True):
        fits = [number for number, filled in enumerate(bins) if filled + item <= capacity]
        if fits:
            bins[max(fits, key=lambda number: bins[number])] += item
        else:
            bins.append(item)
    return sorted(bins)


def twin_bound(items: list[int], capacity: int) -> int:
    best = -(-sum(items) // capacity)
    for small in range(capacity // 2 + 1):
        alone = [item for item in items if item > capacity - small]
        large = [item for item in items if capacity // 2 < item <= capacity - small]
        other = [item for item in items if small <= item <= capacity // 2]
        room = sum(capacity - item for item in large)
        best = max(best, len(alone) + len(large) + max(0, -(-(sum(other) - room) // capacity)))
    return best


def fewest_bins(items: list[int], capacity: int) -> int:
    """By trying every way."""

    def fits(left: list[int], bins: list[int]) -> bool:
        if not left:
            return True
        tried = set()
        for number, filled in enumerate(bins):
            if filled + left[0] <= capacity and filled not in tried:
                tried.add(filled)
                if fits(left[1:], [*bins[:number], filled + left[0], *bins[number + 1 :]]):
                    return True
        return False

    ordered = sorted(items, reverse=True)
    return next(count for count in range(len(items) + 1) if fits(ordered, [0] * count))


@given(Items)
def test_bins_are_filled_like_those_of_a_packing_item_by_item(case: tuple[list[int], int]) -> None:
    items, capacity = case
    bins = best_fit(np.array(items, np.int64), capacity)
    filled = np.bincount(bins, items) if items else np.empty(0)
    assert sorted(filled.astype(int).tolist()) == twin_best_fit(items, capacity)


@given(Items)
def test_the_bound_is_its_formula(case: tuple[list[int], int]) -> None:
    items, capacity = case
    assert lower_bound(np.array(items, np.int64), capacity) == twin_bound(items, capacity)


@given(st.lists(st.integers(1, 12), max_size=8))
def test_no_packing_is_below_the_bound(items: list[int]) -> None:
    assert lower_bound(np.array(items, np.int64), 12) <= fewest_bins(items, 12)


@pytest.mark.parametrize("draw", [lengths.dialogues, lengths.mixed, lengths.lognormal])
@pytest.mark.parametrize("capacity", [512, 2048, 131_072])
def test_bins_are_within_a_hundredth_of_the_bound(draw: Callable[[int], lengths.Int64], capacity: int) -> None:
    items = draw(capacity)
    bins = best_fit(items, capacity)
    assert np.bincount(bins, items).max() <= capacity
    assert bins.max() + 1 <= 1.01 * lower_bound(items, capacity)


def test_dialogues_of_more_than_half_a_row_stand_alone_and_short_ones_fill_their_rows_up() -> None:
    dialogues = lengths.dialogues(2048, 1000)
    short = np.full(1000, 400, np.int64)
    assert best_fit(dialogues, 2048).max() + 1 == lower_bound(dialogues, 2048) == 1000
    assert best_fit(np.concatenate([dialogues, short]), 2048).max() + 1 == 1000


def test_items_of_one_length_take_places_in_their_order() -> None:
    bins = best_fit(np.array([5, 3, 5, 3, 5, 3]), 8)
    assert len(set(bins.tolist())) == 3
    for own in (bins[::2], bins[1::2]):
        assert all(a < b for a, b in pairwise(own.tolist()))
