"""Which rows a step holds: each once an epoch, mixed evenly, read window by window, whoever asks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from outgrow.streaming.rows import IndexFacts, RowIndex, SplitFacts, StreamRows
from outgrow.streaming.sampler import Sampler, epoch_order, validation_rows
from outgrow.streaming.shuffle import sort_keys

LENGTH = 8


def stream(name: str, rows: int, window_rows: list[int]) -> StreamRows:
    ends = np.arange(1, rows + 1, dtype=np.int64) * LENGTH
    return StreamRows(name, LENGTH, np.arange(rows), ends, np.ones(rows), np.array(window_rows, np.int64))


def index(*streams: StreamRows) -> RowIndex:
    facts = IndexFacts(
        fingerprint="i",
        store_fingerprint="s",
        sequence_length=LENGTH,
        window_shards=1,
        seed=0,
        train=tuple(SplitFacts(name=s.name, documents=s.num_rows, tokens=s.num_tokens, rows=s.num_rows) for s in streams),
        validation=(),
    )
    return RowIndex(facts, streams, ())


MIXED = index(stream("a", 101, [0, 40, 40, 77, 101]), stream("b", 17, [0, 17]), stream("c", 0, [0]))


def twin_order(index: RowIndex, seed: int, epoch: int) -> list[int]:
    """The same order with lists and sorts."""
    from outgrow.streaming.shuffle import permutation

    placed, first = [], 0
    for number, own in enumerate(index.train):
        keys = sort_keys(own.num_rows, "rows", seed, own.name, epoch).tolist()
        rows: list[int] = []
        for window in permutation(len(own.window_rows) - 1, "windows", seed, own.name, epoch).tolist():
            rows += sorted(range(int(own.window_rows[window]), int(own.window_rows[window + 1])), key=keys.__getitem__)
        placed += [((place + 0.5) / len(rows), number, first + row) for place, row in enumerate(rows)]
        first += own.num_rows
    return [row for _, _, row in sorted(placed)]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_order_is_that_of_a_slow_twin(epoch: int) -> None:
    assert epoch_order(MIXED, 3, epoch).tolist() == twin_order(MIXED, 3, epoch)


def test_each_row_once_an_epoch_and_another_order_in_another_epoch_or_seed() -> None:
    orders = [epoch_order(MIXED, seed, epoch).tolist() for seed, epoch in [(3, 0), (3, 1), (4, 0)]]
    assert all(sorted(order) == list(range(118)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_every_stretch_has_the_mix_of_the_whole() -> None:
    order = epoch_order(MIXED, 3, 0)
    for start in range(118):
        for stop in range(start, 119):
            from_b = int((order[start:stop] >= 101).sum())
            assert abs(from_b - (stop - start) * 17 / 118) < 2


def test_each_stream_is_read_window_by_window() -> None:
    of_a = [row for row in epoch_order(MIXED, 3, 0).tolist() if row < 101]
    windows = [int(np.searchsorted([40, 77], row, "right")) for row in of_a]
    changes = sum(a != b for a, b in zip(windows, windows[1:], strict=False))
    assert changes == 2


@pytest.mark.parametrize("global_rows", [1, 7, 59, 117, 118, 119, 500])
def test_steps_cut_the_epochs_and_are_the_same_in_any_order_of_asking(global_rows: int) -> None:
    straight = Sampler(MIXED, seed=3, global_rows=global_rows)
    num_steps = 3 * straight.steps_per_epoch
    steps = [straight.row_ids(step) for step in range(num_steps)]
    for epoch in range(3):
        own = steps[epoch * straight.steps_per_epoch : (epoch + 1) * straight.steps_per_epoch]
        assert [row for rows in own for row in rows] == epoch_order(MIXED, 3, epoch).tolist()
        assert all(len(rows) == global_rows for rows in own[:-1])
    shuffled = list(range(num_steps))
    random.Random(0).shuffle(shuffled)
    other = Sampler(MIXED, seed=3, global_rows=global_rows)
    assert all(
        other.row_ids(step) == steps[step] and other.epoch(step) == step // straight.steps_per_epoch for step in shuffled
    )


def test_validation_rows_are_spread_and_the_same_every_time() -> None:
    own = stream("v", 10, [0, 10])
    assert validation_rows(own, 0) == validation_rows(own, 10) == validation_rows(own, 99) == tuple(range(10))
    assert validation_rows(own, 4) == (0, 2, 5, 7)
    assert validation_rows(stream("none", 0, [0]), 4) == ()
