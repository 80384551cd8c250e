"""Epochs, shares and stages against a slow twin that merges whole phases by fractions, and the mix as it was asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

import pytest
from datasets_of_cards import card, index_card, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.contracts import DatasetCard
from outgrow.errors import PlanError
from outgrow.recipes.mix import Mix, merged, stage_lengths, taken
from outgrow.recipes.schema import Recipe

# --- merging ----------------------------------------------------------------------------------------------------------


def merge_for_ever(takes: list[int]) -> Iterator[tuple[int, int]]:
    """Slow twin of ``merged``: the next row is always the one that stands first, as a fraction of the whole."""
    rows = [0] * len(takes)
    while True:
        stream = min((s for s, n in enumerate(takes) if n), key=lambda s: (Fraction(2 * rows[s] + 1, 2 * takes[s]), s))
        yield stream, rows[stream]
        rows[stream] += 1


TAKES = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(TAKES, st.integers(0, 150), st.integers(0, 60))
@settings(deadline=None)
def test_any_stretch_of_the_merged_streams_is_that_of_a_slow_twin(takes: list[int], start: int, rows: int) -> None:
    assert merged(takes, start, start + rows) == list(islice(merge_for_ever(takes), start, start + rows))


@given(TAKES, st.integers(0, 300))
@settings(deadline=None)
def test_what_is_taken_is_counted_without_going_through_it(takes: list[int], rows: int) -> None:
    counts = [0] * len(takes)
    for stream, _ in islice(merge_for_ever(takes), rows):
        counts[stream] += 1
    assert taken(takes, rows) == tuple(counts)


@given(TAKES)
@settings(deadline=None)
def test_a_whole_has_exactly_its_rows(takes: list[int]) -> None:
    assert taken(takes, sum(takes)) == tuple(takes)
    assert taken(takes, 7 * sum(takes)) == tuple(7 * own for own in takes)


def test_places_are_compared_exactly_where_floats_are_equal() -> None:
    """The last rows of two streams of n + 1 and n rows: floats put them at the same place, the wrong one first."""
    n = 10**12
    assert (n + 0.5) / (n + 1) == (n - 1 + 0.5) / n
    assert merged([n + 1, n], 2 * n - 1, 2 * n + 1) == [(1, n - 1), (0, n)]


@pytest.mark.parametrize("takes", [[101, 17, 3], [10**10, 3 * 10**9 + 1, 7], [1, 10**6]])
def test_every_stretch_has_the_mix_of_the_whole(takes: list[int]) -> None:
    draw = random.Random(1)
    for _ in range(200):
        start, rows = draw.randrange(sum(takes)), draw.randrange(1, 500)
        counts = [0] * len(takes)
        for stream, _ in merged(takes, start, start + rows):
            counts[stream] += 1
        for stream, own in enumerate(takes):
            assert abs(counts[stream] - rows * own / sum(takes)) <= 2


# --- whole runs against a twin ----------------------------------------------------------------------------------------


def steps_of_twin(mix: Mix, asked: Recipe, dataset: DatasetCard, steps: int) -> list[list[tuple[int, int]]]:
    """The rows of the first steps, phase by phase and row by row, each stream counting on where it is."""
    made: list[list[tuple[int, int]]] = []
    places = [0] * len(mix.streams)
    number = 0
    while len(made) < steps:
        phase = mix.phases[0 if mix.in_epochs else number]
        if number and not mix.in_epochs and phase.index != mix.phases[number - 1].index:
            before = dataset.indexes[mix.phases[number - 1].index]
            after = dataset.indexes[phase.index]
            pairs = zip(places, before.streams, after.streams, strict=True)
            places = [-(-place * new.rows // old.rows) for place, old, new in pairs]
        starts = list(places)
        left = sum(phase.takes) if mix.in_epochs else (phase.steps or steps) * asked.batch.rows
        rows = islice(merge_for_ever(list(phase.takes)), left)
        while step := list(islice(rows, asked.batch.rows)):
            made.append([(stream, starts[stream] + row) for stream, row in step])
            for stream, _ in step:
                places[stream] += 1
        number += 1
    return made[:steps]


def assert_equal_to_twin(asked: Recipe, dataset: DatasetCard, steps: int) -> None:
    mix = Mix.of(asked, dataset)
    expected = steps_of_twin(mix, asked, dataset, steps)
    order = list(range(steps))
    random.Random(0).shuffle(order)
    assert {step: mix.rows(step) for step in order} == dict(enumerate(expected))
    for upto in (1, steps // 2, steps):
        counts = [0] * len(mix.streams)
        for stream, _ in (row for rows in expected[:upto] for row in rows):
            counts[stream] += 1
        assert [sum(own) for own in zip(*(drawn for _, drawn in mix.drawn(upto)), strict=True)] == counts


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([None, 0.04, 0.5, 1.0, 2.5, 3.0])), min_size=1, max_size=4),
    st.integers(1, 30),
)
@settings(deadline=None, max_examples=60)
def test_epochs_are_those_of_a_slow_twin(streams: list[tuple[int, float | None]], batch_rows: int) -> None:
    if not any(rows for rows, _ in streams):
        return
    names = "abcd"[: len(streams)]
    asked = recipe(rows=batch_rows, streams={name: {"epochs": e} for name, (_, e) in zip(names, streams, strict=True)})
    dataset = card(index_card(16, {name: (rows, rows * 13) for name, (rows, _) in zip(names, streams, strict=True)}))
    assert_equal_to_twin(asked, dataset, 25)


STAGES = [
    {"tokens": 7 * 16 * 9 - 5, "shares": {"a": 0.7, "b": 0.3}},
    {"tokens": 7 * 32 * 4, "shares": {"a": 0.2, "c": 0.8}, "sequence_length": 32},
    {"tokens": 1, "shares": {"b": 1}, "sequence_length": 32},
    {"shares": {"a": 0.5, "b": 0.25, "c": 0.25}},
]
INDEXES = (
    index_card(16, {"a": (101, 101 * 16), "b": (37, 37 * 11), "c": (10, 99)}),
    index_card(32, {"a": (51, 101 * 16), "b": (14, 37 * 11), "c": (5, 99)}),
)


def test_stages_are_those_of_a_slow_twin() -> None:
    assert_equal_to_twin(recipe(rows=7, streams=dict.fromkeys("abc", {}), stages=STAGES), card(*INDEXES), 60)


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_by_default_an_epoch_takes_each_row_once() -> None:
    mix = Mix.of(recipe(rows=7, streams={"a": {}, "b": {}}), card(index_card(16, {"a": (40, 640), "b": (9, 100)})))
    assert mix.steps_per_epoch == 7
    for epoch in range(3):
        rows = [row for step in range(7 * epoch, 7 * epoch + 7) for row in mix.rows(step)]
        assert sorted(rows) == [(0, 40 * epoch + k) for k in range(40)] + [(1, 9 * epoch + k) for k in range(9)]
    phase = mix.phase(15)
    assert (phase.epoch, phase.first_step, phase.steps, phase.starts) == (2, 14, 7, (80, 18))


@pytest.mark.parametrize(
    ("rows", "epochs", "takes"),
    [(1000, 0.1, 100), (10, 3, 30), (5, 0.5, 2), (7, 0.5, 4), (10, 0.01, 1), (30, 1.1, 33), (0, 2, 0)],
)
def test_rows_of_an_epoch_are_rounded_as_written_and_never_away(rows: int, epochs: float, takes: int) -> None:
    streams = {"a": {"epochs": epochs}, "b": {}}
    mix = Mix.of(recipe(streams=streams), card(index_card(16, {"a": (rows, 16 * rows), "b": (50, 800)})))
    assert mix.phases[0].takes == (takes, 50)


def tokens_by_stream(mix: Mix, lengths: list[list[int]], steps: range) -> list[int]:
    """Real tokens, row for row: stream s has rows of ``lengths[s]`` tokens."""
    tokens = [0] * len(lengths)
    for step in steps:
        for stream, place in mix.rows(step):
            tokens[stream] += lengths[stream][place % len(lengths[stream])]
    return tokens


def uneven(seed: int, rows: int, least: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(least, length) for _ in range(rows)]


def counted(length: int, lengths: dict[str, list[int]]) -> Any:
    return index_card(length, {name: (len(rows), sum(rows)) for name, rows in lengths.items()})


def test_shares_of_an_epoch_are_met_in_tokens_within_a_thousandth() -> None:
    """Rows of one stream are a quarter full, those of another nearly full, and 2,000 rows of replay come in many passes."""
    lengths = {
        "books": uneven(1, 20_011, 500, 512),
        "dialogues": uneven(2, 9_973, 40, 220),
        "general": uneven(3, 2_003, 300, 512),
    }
    streams = {"books": {}, "dialogues": {"epochs": 1.5}, "general": {"share": 0.25}}
    mix = Mix.of(recipe(rows=64, streams=streams), card(counted(512, lengths)))
    assert mix.phases[0].takes[:2] == (20_011, 14_960)
    assert mix.phases[0].takes[2] > 3 * 2_003
    for epoch in range(2):
        steps = range(epoch * mix.steps_per_epoch, (epoch + 1) * mix.steps_per_epoch)
        tokens = tokens_by_stream(mix, list(lengths.values()), steps)
        assert tokens[2] / sum(tokens) == pytest.approx(0.25, abs=0.001)


def test_when_all_streams_have_shares_an_epoch_is_as_long_as_the_dataset() -> None:
    lengths = {"a": uneven(1, 9_001, 100, 128), "b": uneven(2, 3_003, 20, 128), "c": uneven(3, 12_345, 60, 70)}
    streams = {"a": {"share": 0.6}, "b": {"share": 0.3}, "c": {"share": 0.1}}
    mix = Mix.of(recipe(rows=32, streams=streams), card(counted(128, lengths)))
    tokens = tokens_by_stream(mix, list(lengths.values()), range(mix.steps_per_epoch))
    assert sum(tokens) == pytest.approx(sum(map(sum, lengths.values())), rel=0.01)
    assert [own / sum(tokens) for own in tokens] == pytest.approx([0.6, 0.3, 0.1], abs=0.001)


def test_every_batch_keeps_the_mix_and_the_last_of_an_epoch_is_short() -> None:
    mix = Mix.of(
        recipe(rows=50, streams={"a": {}, "b": {"share": 0.2}}),
        card(index_card(16, {"a": (800, 800 * 16), "b": (90, 90 * 16)})),
    )
    assert mix.phases[0].takes == (800, 200)
    for step in range(2 * mix.steps_per_epoch):
        assert sum(stream for stream, _ in mix.rows(step)) == 10
    short = Mix.of(
        recipe(rows=300, streams={"a": {}, "b": {"share": 0.2}}), card(index_card(16, {"a": (800, 12800), "b": (90, 1440)}))
    )
    assert [len(short.rows(step)) for step in range(5)] == [300, 300, 300, 100, 300]


# --- stages -----------------------------------------------------------------------------------------------------------


def test_stages_last_whole_full_steps() -> None:
    asked = recipe(rows=7, streams=dict.fromkeys("abc", {}), stages=STAGES)
    assert stage_lengths(asked) == [(9, 16), (4, 32), (1, 32), (None, 16)]
    mix = Mix.of(asked, card(*INDEXES))
    assert [(p.index, p.sequence_length, p.first_step, p.steps, p.epoch) for p in mix.phases] == [
        (0, 16, 0, 9, 0), (1, 32, 9, 4, 0), (1, 32, 13, 1, 0), (0, 16, 14, None, 0),
    ]  # fmt: skip
    assert mix.steps_per_epoch == 0
    assert [mix.phases.index(mix.phase(step)) for step in (0, 8, 9, 12, 13, 14, 10**9)] == [0, 0, 1, 1, 2, 3, 3]
    assert all(len(mix.rows(step)) == 7 for step in range(40))
    assert {stream for stream, _ in mix.rows(13)} == {1}, "a stream that is not named gives none"


def test_shares_of_a_stage_are_met_in_tokens_within_a_thousandth() -> None:
    short = {"a": uneven(1, 3_001, 240, 256), "b": uneven(2, 5_003, 100, 256), "c": uneven(3, 411, 120, 180)}
    long = {"a": uneven(4, 1_503, 480, 512), "b": uneven(5, 2_301, 220, 512), "c": uneven(6, 211, 220, 380)}
    stages = [
        {"tokens": 6_000_000, "shares": {"a": 0.5, "b": 0.3, "c": 0.2}},
        {"shares": {"a": 0.1, "b": 0.85, "c": 0.05}, "sequence_length": 512},
    ]
    asked = recipe(rows=32, length=256, streams=dict.fromkeys("abc", {}), stages=stages)
    mix = Mix.of(asked, card(counted(256, short), counted(512, long)))
    end = mix.phases[1].first_step
    first = tokens_by_stream(mix, list(short.values()), range(end))
    assert [own / sum(first) for own in first] == pytest.approx([0.5, 0.3, 0.2], abs=0.001)
    second = tokens_by_stream(mix, list(long.values()), range(end, end + 800))
    assert [own / sum(second) for own in second] == pytest.approx([0.1, 0.85, 0.05], abs=0.001)


def test_a_stream_goes_on_where_the_last_stage_left_it() -> None:
    mix = Mix.of(recipe(rows=7, streams=dict.fromkeys("abc", {}), stages=STAGES), card(*INDEXES))
    first, second, third, fourth = mix.phases
    drawn = [dict(zip(mix.streams, counts, strict=True)) for _, counts in mix.drawn(15)]
    assert second.starts == tuple(
        -(-drawn[0][name] * new // old) for name, old, new in (("a", 101, 51), ("b", 37, 14), ("c", 10, 5))
    )
    assert third.starts == tuple(start + drawn[1][name] for name, start in zip("abc", second.starts, strict=True))
    assert first.starts == (0, 0, 0)
    assert fourth.starts[2] == -(-third.starts[2] * 10 // 5), "a stream that rests keeps its place"


def test_a_longer_index_goes_on_in_the_same_pass() -> None:
    stages = [{"tokens": 10 * 16 * 250, "shares": {"a": 1}}, {"shares": {"a": 1}, "sequence_length": 32}]
    dataset = card(index_card(16, {"a": (1000, 16_000)}), index_card(32, {"a": (500, 16_000)}))
    mix = Mix.of(recipe(rows=10, stages=stages), dataset)
    assert mix.phases[1].starts == (1250,)  # two and a half passes, in either


def test_a_tiny_share_still_comes() -> None:
    stages = [{"shares": {"a": 1 - 1e-9, "b": 1e-9}}]
    mix = Mix.of(recipe(streams={"a": {}, "b": {}}, stages=stages), card(index_card(16, {"a": (100, 1600), "b": (100, 1600)})))
    assert mix.drawn(10**9)[0][1][1] == pytest.approx(8, abs=1)


# --- as plain data, and refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[], STAGES])
def test_a_mix_is_plain_data_and_its_fingerprint_follows_it(stages: list[Any]) -> None:
    mix = Mix.of(recipe(rows=7, streams=dict.fromkeys("abc", {}), stages=stages), card(*INDEXES))
    assert Mix.from_dict(json.loads(json.dumps(mix.to_dict()))) == mix
    other = Mix.of(recipe(rows=8, streams=dict.fromkeys("abc", {}), stages=stages), card(*INDEXES))
    assert mix.fingerprint != other.fingerprint


def test_ten_billion_rows_are_nothing_special() -> None:
    rows = {f"s{number:02}": (10**9 + number, 512 * 10**9) for number in range(20)}
    mix = Mix.of(recipe(rows=1024, streams={name: {} for name in rows}), card(index_card(512, rows)))
    step = 17 * mix.steps_per_epoch + 12_345_678
    assert len(set(mix.rows(step))) == 1024
    assert {place // (10**9 + stream) for stream, place in mix.rows(step)} == {17}


def refused(asked: Recipe, dataset: DatasetCard) -> str:
    with pytest.raises(PlanError) as caught:
        Mix.of(asked, dataset)
    return caught.value.message


def test_a_share_of_a_stream_without_rows_is_refused_by_name() -> None:
    dataset = card(index_card(16, {"a": (5, 80), "b": (0, 0)}))
    assert refused(recipe(streams={"a": {}, "b": {"share": 0.2}}), dataset) == (
        "stream 'b' of data.streams has share: 0.2, but the stream has no row to train on"
    )
    assert refused(recipe(streams={"a": {"share": 0.2}, "b": {}}), dataset) == (
        "the streams of data.streams without share have no row to train on; the others would be shares of nothing"
    )
    stages = [{"tokens": 5, "shares": {"a": 1, "b": 0}}, {"shares": {"a": 0.5, "b": 0.5}}]
    assert refused(recipe(streams={"a": {}, "b": {}}, stages=stages), dataset) == (
        "data.stages[1].shares.b is 0.5, but the stream has no row to train on"
    )
    assert refused(recipe(), card(index_card(16, {"a": (0, 0)}))) == "the dataset has no row to train on"
