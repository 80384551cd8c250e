"""Which rows a step holds: each once a pass, read window by window, in the order of the source where asked, whoever asks."""

from __future__ import annotations

import random
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from datasets_of_cards import card, index_card, recipe

from outgrow.recipes.mix import Mix
from outgrow.streaming.sampler import Sampler, StreamOrder, validation_rows
from outgrow.streaming.shuffle import permutation, sort_keys

LENGTH = 8


@dataclass(frozen=True)
class Rows:
    """What the sampler sees of a stream."""

    name: str
    window_rows: npt.NDArray[np.int64]
    sequential: bool = False

    @property
    def num_rows(self) -> int:
        return int(self.window_rows[-1])


@dataclass(frozen=True)
class Index:
    train: tuple[Rows, ...]

    def streams(self, split: str) -> tuple[Rows, ...]:
        assert split == "train"
        return self.train

    def first_rows(self, split: str) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(stream.num_rows for stream in self.streams(split))], dtype=np.int64)


def stream(name: str, window_rows: list[int], *, sequential: bool = False) -> Rows:
    return Rows(name, np.array(window_rows, np.int64), sequential)


MIXED = Index((stream("a", [0, 40, 40, 77, 101]), stream("b", [0, 17]), stream("c", [0])))


def mix_of(*indexes: Index, rows: int = 7, **keys: object) -> Mix:
    cards = [
        index_card(LENGTH * (1 + n), {s.name: (s.num_rows, LENGTH * (1 + n) * s.num_rows) for s in index.train})
        for n, index in enumerate(indexes)
    ]
    streams = keys.pop("streams", {s.name: {} for s in indexes[0].train})
    return Mix.of(recipe(rows, length=LENGTH, streams=streams, **keys), card(*cards))  # type: ignore[arg-type]


def rows_in_order(own: Rows, seed: int, number: int) -> list[int]:
    """Slow twin of one pass over a stream: every row has a key of its own, drawn for the whole stream at once."""
    if own.sequential:
        return list(range(own.num_rows))
    keys = sort_keys(own.num_rows, "rows", seed, own.name, number).tolist()
    rows: list[int] = []
    for window in permutation(len(own.window_rows) - 1, "windows", seed, own.name, number).tolist():
        rows += sorted(range(int(own.window_rows[window]), int(own.window_rows[window + 1])), key=keys.__getitem__)
    return rows


def twin_epoch(index: Index, seed: int, epoch: int) -> list[int]:
    """One epoch that takes every row once, whole, merged by a sort of floats."""
    placed, first = [], 0
    for number, own in enumerate(index.train):
        order = rows_in_order(own, seed, epoch)
        placed += [((place + 0.5) / len(order), number, first + row) for place, row in enumerate(order)]
        first += own.num_rows
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


@pytest.mark.parametrize("global_rows", [1, 7, 59, 117, 118, 119, 500])
def test_epochs_are_those_of_a_slow_twin_in_any_order_of_asking(global_rows: int) -> None:
    mix = mix_of(MIXED, rows=global_rows)
    straight = Sampler([MIXED], mix, 3)
    steps = [straight.row_ids(step) for step in range(3 * mix.steps_per_epoch)]
    for epoch in range(3):
        own = steps[epoch * mix.steps_per_epoch : (epoch + 1) * mix.steps_per_epoch]
        assert [row for rows in own for row in rows] == twin_epoch(MIXED, 3, epoch)
        assert all(len(rows) == global_rows for rows in own[:-1])
    shuffled = list(range(len(steps)))
    random.Random(0).shuffle(shuffled)
    other = Sampler([MIXED], mix, 3)
    assert all(
        other.row_ids(step) == steps[step] and other.phase(step).epoch == step // mix.steps_per_epoch for step in shuffled
    )


def test_each_row_once_an_epoch_and_another_order_in_another_epoch_or_seed() -> None:
    orders = [[row for step in range(17) for row in Sampler([MIXED], mix_of(MIXED), seed).row_ids(step)] for seed in (3, 4)]
    assert all(sorted(order) == list(range(118)) for order in orders)
    assert orders[0] != orders[1] != twin_epoch(MIXED, 4, 1)


@pytest.mark.parametrize("own", MIXED.train[:2])
def test_passes_follow_each_other_in_any_order_of_asking(own: Rows) -> None:
    expected = [row for number in range(5) for row in rows_in_order(own, 9, number)]
    places = list(range(len(expected)))
    random.Random(0).shuffle(places)
    order = StreamOrder(own, 9)
    assert {place: order.row(place) for place in places} == dict(enumerate(expected))


def test_each_stream_is_read_window_by_window() -> None:
    order = StreamOrder(MIXED.train[0], 3)
    windows = [int(np.searchsorted([40, 77], order.row(place), "right")) for place in range(101)]
    assert sum(a != b for a, b in zip(windows, windows[1:], strict=False)) == 2


def test_a_sequential_stream_keeps_its_order_beside_a_shuffled_one() -> None:
    index = Index((stream("book", [0, 30, 50], sequential=True), stream("web", [0, 25])))
    sampler = Sampler([index], mix_of(index, rows=6), 3)
    rows = [row for step in range(26) for row in sampler.row_ids(step)]  # two epochs
    assert [row for row in rows if row < 50] == [*range(50), *range(50)]
    assert [row - 50 for row in rows if row >= 50] == [row for n in range(2) for row in rows_in_order(index.train[1], 3, n)]


def test_several_passes_in_an_epoch_and_parts_of_one_go_on_where_the_last_ended() -> None:
    index = Index((stream("a", [0, 40, 41, 60]), stream("b", [0, 17])))
    mix = mix_of(index, streams={"a": {"epochs": 0.35}, "b": {"epochs": 2}})
    sampler = Sampler([index], mix, 3)
    rows = [row for step in range(3 * mix.steps_per_epoch) for row in sampler.row_ids(step)]
    passes = [row for number in range(6) for row in rows_in_order(index.train[1], 3, number)]
    assert [row - 60 for row in rows if row >= 60] == passes
    straight = [row for number in range(2) for row in rows_in_order(index.train[0], 3, number)]
    assert [row for row in rows if row < 60] == straight[: 3 * 21]


def test_a_stage_with_other_rows_is_numbered_in_its_own_index_and_goes_on_in_the_same_windows() -> None:
    """Window w of either index holds the same documents; the second has half as many rows."""
    short = Index((stream("a", [0, 400, 1000, 1600, 2000]), stream("b", [0, 100])))
    long = Index((stream("a", [0, 200, 500, 800, 1000]), stream("b", [0, 50])))
    stages = [{"tokens": 9 * LENGTH * 100, "shares": {"a": 1}}, {"shares": {"a": 0.9, "b": 0.1}, "sequence_length": 2 * LENGTH}]
    mix = mix_of(short, long, rows=9, stages=stages)
    sampler = Sampler([short, long], mix, 3)
    before = [row for step in range(100) for row in sampler.row_ids(step)]
    assert before == rows_in_order(short.train[0], 3, 0)[:900]
    after = [row for step in range(100, 160) for row in sampler.row_ids(step) if row < 1000]
    assert after == rows_in_order(long.train[0], 3, 0)[450 : 450 + len(after)]
    assert (sampler.phase(99).index, sampler.phase(100).index, sampler.phase(100).epoch) == (0, 1, 0)
    window_of = [int(np.searchsorted([200, 500, 800], row, "right")) for row in after]
    assert window_of[0] == np.searchsorted([400, 1000, 1600], before[-1], "right")
    assert {row - 1000 for step in range(100, 300) for row in sampler.row_ids(step) if row >= 1000} == set(range(50))


def test_ten_billion_rows_start_at_once_and_take_little_memory() -> None:
    """62,500 windows of sixteen shards: a million shards. The first step, one of the fourth pass, and the step after it."""
    index = Index((stream("web", np.linspace(0, 10**10, 62_501).astype(np.int64).tolist()), stream("books", [0, 10**6])))
    mix = mix_of(index, rows=1024)
    tracemalloc.start()
    started = time.process_time()
    sampler = Sampler([index], mix, 3)
    steps = [sampler.row_ids(step) for step in (0, 3 * mix.steps_per_epoch + 4_000_000, 3 * mix.steps_per_epoch + 4_000_001)]
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(set(rows)) for rows in steps] == [1024] * 3
    assert seconds < 1
    assert peak < 50e6


def test_draws_that_are_skipped_are_those_of_the_whole_sequence() -> None:
    whole = sort_keys(1000, "rows", 3, "a", 0)
    assert sort_keys(40, "rows", 3, "a", 0, skip=900).tolist() == whole[900:940].tolist()
    assert permutation(5, "rows", 3, "a", 0).tolist() == [2, 4, 1, 0, 3], "orders stay the same for ever"
    assert permutation(5, "rows", 3, "a", 0, skip=10**10).tolist() == [1, 4, 2, 3, 0], "orders stay the same for ever"


def test_validation_rows_are_spread_and_the_same_every_time() -> None:
    own = stream("v", [0, 10])
    assert validation_rows(own, 0) == validation_rows(own, 10) == validation_rows(own, 99) == tuple(range(10))
    assert validation_rows(own, 4) == (0, 2, 5, 7)
    assert validation_rows(stream("none", [0]), 4) == ()
