"""Rows as arrays, token by token against a twin; the answers of preference pairs are segments of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.streaming.packing import idle_row, pack
from outgrow.streaming.row_windows import Window
from outgrow.streaming.rows import StreamRows

LENGTH = 12
Float32 = npt.NDArray[np.float32]


class Given:
    """Documents as lists of tokens; some with weights, some with the length of the chosen answer of a pair."""

    def __init__(
        self, tokens: list[list[int]], weights: Mapping[int, list[float]], chosen: Mapping[int, int] | None = None
    ) -> None:
        self._tokens = tokens
        self._weights = weights
        self._chosen = chosen

    def tokens(self, document: int) -> npt.NDArray[Any]:
        return np.array(self._tokens[document], np.uint16)

    def weights(self, document: int) -> Float32 | None:
        return np.array(self._weights[document], np.float32) if document in self._weights else None

    def spans(self, document: int) -> npt.NDArray[np.int32] | None:
        assert self._chosen is not None, "asked of a stream without pairs"
        if document not in self._chosen:
            return None
        middle, end = self._chosen[document], len(self._tokens[document])
        return np.array([[0, middle], [middle, end]], np.int32)


def rows_of(lengths: list[int], cuts: list[int], *, pairs: bool = False) -> StreamRows:
    window = Window(
        first=0,
        order=np.arange(len(lengths), dtype=np.uint32),
        starts=np.empty(0, np.uint32),
        ends=np.cumsum(lengths, dtype=np.int64),
        cuts=np.array(cuts, np.int64),
        weights=np.zeros(len(cuts) - 1),
    )
    return StreamRows(
        name="x",
        sequence_length=LENGTH,
        window_rows=np.array([0, len(cuts) - 1], np.int64),
        read=lambda number: window,
        pairs=pairs,
    )


def test_a_cut_document_predicts_over_the_cut_and_is_a_new_segment_after_it() -> None:
    tokens = [[11, 12, 13], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [41]]
    weights = {1: [9.0, 0.5, 0.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.25, 1.0, 3.0]}
    stream = rows_of([3, 11, 1], [0, 12, 15])
    packed = pack([0, 1], [stream], np.array([0, 2]), [Given(tokens, weights)], fill_token=7)

    assert packed.token_ids.tolist() == [[11, 12, 13, *range(21, 30)], [30, 31, 41, *[7] * 9]]
    assert packed.targets.tolist() == [[12, 13, -100, *range(22, 31)], [31, *[-100] * 11]]
    assert packed.weights.tolist() == [[1, 1, 0, 0.5, 0, 1, 1, 2, 1, 1, 0.25, 1], [3, *[0] * 11]]
    assert packed.segments.tolist() == [[0] * 3 + [1] * 9, [0, 0, 1, *[-1] * 9]]
    assert packed.positions.tolist() == [[0, 1, 2, *range(9)], [0, 1, 0, *range(9)]]
    assert (packed.pairs == -1).all()
    assert packed.row_ids.tolist() == [0, 1]


def test_answers_of_a_pair_are_segments_of_their_own_and_no_target_crosses_them() -> None:
    prompts = [[11, 12, 13, 14, 11, 12, 15], [31, 32, 31, 33, 34]]
    weights = {0: [0.0, 0, 1, 1, 0, 0, 0.5]}
    stream = rows_of([7, 5], [0, 12], pairs=True)
    packed = pack([0], [stream], np.array([0, 1]), [Given(prompts, weights, {0: 4, 1: 2})], fill_token=7)

    assert packed.token_ids.tolist() == [[11, 12, 13, 14, 11, 12, 15, 31, 32, 31, 33, 34]]
    assert packed.targets.tolist() == [[12, 13, 14, -100, 12, 15, -100, 32, -100, 33, 34, -100]]
    assert packed.weights.tolist() == [[0, 1, 1, 0, 0, 0.5, 0, 1, 0, 1, 1, 0]]
    assert packed.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert packed.pairs.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]]


def test_pairs_are_counted_in_each_row_and_a_plain_document_among_them_is_none() -> None:
    tokens = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10]]
    stream = rows_of([3, 2, 3, 2], [0, 8, 10], pairs=True)
    packed = pack([1, 0], [stream], np.array([0, 2]), [Given(tokens, {}, {0: 2, 2: 1, 3: 1})], fill_token=0)

    assert packed.row_ids.tolist() == [1, 0]
    assert packed.pairs.tolist() == [[0, 1, *[-1] * 10], [0, 0, 1, -1, -1, 2, 3, 3, *[-1] * 4]]
    assert packed.segments.tolist() == [[0, 1, *[-1] * 10], [0, 0, 1, 2, 2, 3, 4, 4, *[-1] * 4]]
    assert packed.targets[1].tolist() == [2, -100, -100, 5, -100, -100, 8, -100, *[-100] * 4]


def test_an_idle_row_weighs_nothing_and_holds_no_pair() -> None:
    row = idle_row(LENGTH, 5)
    assert (row.token_ids == 5).all()
    assert (row.targets == -100).all()
    assert row.weights.sum() == 0
    assert (row.segments == 0).all()
    assert (row.pairs == -1).all()
    assert row.row_ids.tolist() == [-1]


def test_rows_of_several_streams_come_in_the_order_asked_for() -> None:
    streams = [rows_of([3, 2], [0, 3, 5]), rows_of([2, 2], [0, 2, 4])]
    sources = [Given([[1, 2, 3], [4, 5]], {}), Given([[6, 7], [8, 9]], {})]
    packed = pack([3, 0, 2, 1], streams, np.array([0, 2, 4]), sources, fill_token=0)
    assert [row[row > 0].tolist() for row in packed.token_ids] == [[8, 9], [1, 2, 3], [6, 7], [4, 5]]
