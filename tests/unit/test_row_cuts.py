"""Where rows end: full rows, at borders where that wastes little; every rule against a slow twin."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import lengths
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.streaming.row_cuts import BORDER_BUDGET, Borders, full_rows, pieces, whole_rows

Documents = st.lists(st.tuples(st.integers(1, 30), st.sets(st.integers(1, 29), max_size=6)), max_size=25)


def make(documents: list[tuple[int, set[int]]]) -> tuple[lengths.Int64, Borders]:
    """Lengths and borders of documents; borders beyond a document's end are left out."""
    borders = [sorted(border for border in own if border < length) for length, own in documents]
    counts = np.array([len(own) for own in borders], np.int32)
    tokens = np.array([border for own in borders for border in own], np.int32)
    return np.array([length for length, _ in documents], np.int64), Borders.of(counts, tokens)


def twin_full_rows(documents: list[tuple[int, set[int]]], length: int) -> tuple[list[int], int]:
    """Token by token: where rows end, and how many of the inner ends are at borders."""
    good, at = set(), 0
    for tokens, borders in documents:
        good |= {at} | {at + border for border in borders if border < tokens}
        at += tokens
    total = at
    fewest = -(-total // length)
    budget = (fewest + int(fewest * BORDER_BUDGET)) * length - total
    cuts, given_up, at_borders = [0], 0, 0
    while total - cuts[-1] > length:
        full = cuts[-1] + length
        stop = max(place for place in range(full + 1) if place in good)
        if 2 * (full - stop) < length and given_up + full - stop <= Fraction(budget * full, total):
            given_up += full - stop
            at_borders += 1
            cuts.append(stop)
        else:
            cuts.append(full)
    return [*cuts, total] if total else [0], at_borders


@given(Documents, st.integers(1, 40))
def test_full_rows_are_those_of_the_twin(documents: list[tuple[int, set[int]]], length: int) -> None:
    own, borders = make(documents)
    cuts = full_rows(np.arange(len(own)), np.cumsum(own), borders, length)
    assert (cuts.at.tolist(), cuts.at_borders) == twin_full_rows(documents, length)


@given(Documents, st.integers(8, 40))
def test_full_rows_are_no_more_than_need_be_in_a_small_window_and_none_is_too_long(
    documents: list[tuple[int, set[int]]], length: int
) -> None:
    own, borders = make(documents)
    order = np.random.default_rng(len(own)).permutation(len(own))
    cuts = full_rows(order, np.cumsum(own[order]), borders, length).at
    assert len(cuts) - 1 == -(-int(own.sum()) // length)
    assert all(0 < tokens <= length for tokens in np.diff(cuts).tolist())


@pytest.mark.parametrize("draw", [lengths.books, lengths.articles, lengths.scenes])
@pytest.mark.parametrize(("length", "share"), [(512, 0.35), (2048, 0.7), (8192, 0.97)])
def test_rows_are_full_and_most_end_at_a_sentence(draw: Callable[[], lengths.Int64], length: int, share: float) -> None:
    own = draw()
    order = np.random.default_rng(0).permutation(len(own))
    cuts = full_rows(order, np.cumsum(own[order]), lengths.sentences(own), length)
    rows = len(cuts.at) - 1
    assert rows <= 1.005 * -(-int(own.sum()) // length)
    assert np.diff(cuts.at).max() <= length
    assert cuts.at_borders >= share * (rows - 1)


def test_borders_are_met_from_the_beginning_to_the_end_of_a_window() -> None:
    """The budget is not spent on the first rows."""
    own = lengths.articles()
    borders = lengths.sentences(own)
    cuts = full_rows(np.arange(len(own)), np.cumsum(own), borders, 1024).at
    short = np.diff(cuts)[:-1] < 1024
    quarters = [part.mean() for part in np.array_split(short, 4)]
    assert max(quarters) - min(quarters) < 0.1


def test_a_document_without_borders_is_not_moved_to_the_next_row_for_the_most_of_a_row() -> None:
    own, borders = make([(60, set()), (1000, set())])
    assert full_rows(np.arange(2), np.cumsum(own), borders, 100).at.tolist() == [0, *range(100, 1060, 100), 1060]


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_whole_rows_are_taken_in_order_as_long_as_they_fit(documents: list[int], length: int) -> None:
    rows: list[list[int]] = []
    for tokens in documents:
        if not rows or sum(rows[-1]) + tokens > length:
            rows.append([])
        rows[-1].append(tokens)
    cuts = whole_rows(np.cumsum(documents, dtype=np.int64), length)
    assert np.diff(cuts).tolist() == [sum(row) for row in rows]


@given(st.integers(1, 200), st.sets(st.integers(1, 199)), st.integers(1, 50))
def test_pieces_are_a_document_and_end_at_the_last_border_of_their_second_half(
    tokens: int, borders: set[int], length: int
) -> None:
    _, own = make([(3, {1, 2}), (tokens, borders), (5, {4})])
    cut = pieces(1, tokens, own, length)
    assert (cut.at[0], cut.at[-1]) == (0, tokens)
    assert all(0 < size <= length for size in np.diff(cut.at).tolist())
    at_borders = 0
    for start, stop in pairwise(cut.at.tolist()[:-1]):
        last = max((border for border in borders if border <= start + length and border < tokens), default=0)
        at_borders += last > start + length // 2
        assert stop == (last if last > start + length // 2 else start + length)
    assert cut.at_borders == at_borders
