"""Which steps read which shard, against a twin that looks up every row of every step."""

from __future__ import annotations

import random
import time
import tracemalloc
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from plain_needs import PlainStream, plain_needs
from slow_needs import Run, Visits
from token_stores import Dataset, data_of, documents, make_card, make_dataset, write_store

from outgrow.recipes.mix import merged
from outgrow.streaming.tiers.needs import Needs, standing_of


def visits_of(needs: Needs, start: int, stop: int) -> Visits:
    return [(visit.shard, visit.steps.tolist()) for visit in needs.visits(start, stop)]


def streams_of(*counts: int, longest: int = 60) -> dict[str, Any]:
    return {"abcdef"[n]: (documents(n, count, longest=longest), documents(50 + n, 5)) for n, count in enumerate(counts)}


STAGES = [
    {"tokens": 5 * 7 * 32 - 3, "shares": {"a": 0.7, "b": 0.3}},
    {"tokens": 4 * 7 * 64, "shares": {"a": 0.2, "c": 0.8}, "sequence_length": 64},
    {"tokens": 1, "shares": {"b": 1}, "sequence_length": 64},
    {"shares": {"a": 0.5, "b": 0.3, "c": 0.2}},
]
STORES = {"one": streams_of(160), "three": streams_of(120, 4, 60), "long": streams_of(40, longest=400)}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "windows of one shard": ("one", {}, {"window_shards": 1}),
    "windows of three shards": ("one", {}, {"window_shards": 3}),
    "one window of all shards": ("one", {}, {"window_shards": 100}),
    "a third of a pass in an epoch": ("one", {"a": {"epochs": 0.35}}, {}),
    "documents over many rows and shards": ("long", {}, {}),
    "three streams": ("three", {}, {}),
    "sequential beside shuffled": ("three", {"a": {"order": "sequential"}}, {}),
    "whole documents": (
        "three",
        {
            "a": {"split": "never", "too_long": "drop"},
            "b": {"split": "never", "too_long": "drop"},
            "c": {"split": "never", "too_long": "split", "order": "sequential"},
        },
        {"window_shards": 3},
    ),
    "parts of an epoch": ("three", {"a": {"epochs": 0.35}, "b": {"epochs": 1.5}, "c": {"epochs": 0.8}}, {}),
    "shares": ("three", {"b": {"share": 0.3}, "c": {"share": 0.05}}, {}),
    "stages": ("three", {}, {"stages": STAGES}),
}
"""Store, keys of its streams, and of the data section; windows are of two shards where it does not say."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs of three epochs, or 40 steps, of 7 rows; the last step of an epoch is short."""
    folder = tmp_path_factory.mktemp("runs")
    for store, streams in STORES.items():
        write_store(folder / store / "datasets/s", streams)
    made = {}
    for name, (store, options, keys) in RUNS.items():
        section = data_of(STORES[store], options, **keys)
        dataset = Dataset(folder / store, make_card(folder / store, section, 5), STORES[store], 5, section)
        run = Run.of(dataset, 0)
        made[name] = Run.of(dataset, 3 * run.mix.steps_per_epoch or 40)
    return made


@pytest.mark.parametrize("name", RUNS)
def test_visits_are_those_of_a_slow_twin(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    expected = run.visits()
    assert visits_of(run.needs, 0, run.steps) == expected
    assert len({shard for shard, _ in expected}) > 5, "of several shards"
    draw = random.Random(1)
    needs = run.needs
    for _ in range(6):
        start, stop = sorted(draw.sample(range(run.steps + 1), 2))
        assert visits_of(needs, start, stop) == run.visits(start, stop)


@pytest.mark.parametrize("name", RUNS)
def test_the_next_step_is_that_of_a_slow_twin(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    steps: dict[int, set[int]] = {shard: set() for shard in range(len(run.shards))}
    for shard, own in run.visits():
        steps[shard] |= set(own)
    needs, draw = run.needs, random.Random(2)
    for _ in range(300):
        shard, after = draw.randrange(len(run.shards)), draw.randrange(-1, run.steps)
        stop = draw.choice([run.steps, draw.randrange(run.steps + 1)])
        expected = min((step for step in steps[shard] if after < step < stop), default=None)
        assert needs.next_step(shard, after, stop) == expected
        latest = needs.latest_step(shard, after, stop)
        assert latest is None if expected is None else latest is not None and expected <= latest < stop


def test_every_row_in_one_step_and_several_passes_in_one(tmp_path: Path) -> None:
    run = Run.of(make_dataset(tmp_path, streams_of(120, 20), options={"b": {"share": 0.7}}), 6, rows=500)
    assert visits_of(run.needs, 0, 6) == run.visits()
    assert run.needs.next_step(0, 0, 6) == 1


def test_rows_that_are_given_up_need_nothing(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, streams_of(150, 60), window_shards=2)
    ends = Run.of(dataset, 0).shards.documents(0, "train").tolist()
    run = Run.of(dataset, 20, {"a": [range(ends[2], ends[3])]})
    assert visits_of(run.needs, 0, 20) == run.visits()
    assert 3 not in {shard for shard, _ in run.visits()}
    assert run.needs.next_step(3, -1, 20) is None


def test_shards_that_no_row_reads_are_needed_by_no_step(tmp_path: Path) -> None:
    """Documents that are too long are dropped: some shards hold no other, and one window has no row."""
    docs = [documents(n, 1, longest=20 if n < 40 or n > 80 else 500)[0] for n in range(120)]
    options = {"a": {"split": "never", "too_long": "drop"}}
    dataset = make_dataset(tmp_path, {"a": (docs, [])}, options=options, window_shards=2)
    run = Run.of(dataset, 0)
    run = Run.of(dataset, 4 * run.mix.steps_per_epoch)
    assert visits_of(run.needs, 0, run.steps) == run.visits()
    unread = set(range(len(run.shards))) - {shard for shard, _ in run.visits()}
    assert len(unread) > 2
    needs = run.needs
    assert {needs.next_step(shard, 3, run.steps) for shard in unread} == {None}
    assert {needs.latest_step(shard, 3, run.steps) for shard in unread} == {None}, "known by then"


def test_held_out_shards_are_needed_by_no_step(runs: dict[str, Run]) -> None:
    run = runs["three streams"]
    held_out = run.shards.numbers(0, "validation")
    assert len(held_out)
    assert {run.needs.next_step(shard, -1, run.steps) for shard in held_out} == {None}


def test_where_rows_stand_among_the_streams_is_where_the_mix_merges_them() -> None:
    draw = random.Random(3)
    for _ in range(100):
        takes = [draw.choice([0, draw.randrange(1, 60)]) for _ in range(draw.randrange(1, 6))] + [draw.randrange(1, 60)]
        rows = merged(takes, 0, 300)
        for stream, own in enumerate(takes):
            places = [place for place, (at, _) in enumerate(rows) if at == stream]
            first = draw.randrange(len(places) + 1)
            if own:
                assert standing_of(takes, stream, first, len(places) - first).tolist() == places[first:]


def test_where_rows_stand_is_exact_for_shares_of_two_to_the_fortieth() -> None:
    takes = [2**40 - 2**27 - 3, 2**27, 3]
    for stream, first in ((0, 10**12), (1, 10**9), (2, 7)):
        found = standing_of(takes, stream, first, 5_000_000 if stream == 0 else 50)
        for at in (0, 1, 49, len(found) - 1):
            row = first + at
            others = [
                Fraction((2 * row + 1) * rows - takes[stream], 2 * takes[stream])
                for other, rows in enumerate(takes)
                if other != stream
            ]
            assert found[at] == row + sum(place.__floor__() + 1 for place in others), "no tie among these"


def test_a_hundred_thousand_shards_start_at_once_and_take_little_memory() -> None:
    """6,250 windows of 16 shards: the first visits of the run, those at the end of the third epoch, and when they come next."""
    stream = PlainStream(shards=100_000, rows=100, documents=300, keys={})
    tracemalloc.start()
    started = time.process_time()
    needs, mix = plain_needs([stream], window_shards=16, batch_rows=256)
    steps = 3 * mix.steps_per_epoch
    first = list(islice(needs.visits(0, steps), 100))
    late = list(islice(needs.visits(steps - 10_000, steps), 100))
    again = [needs.next_step(visit.shard, steps // 2, steps) for visit in first[:2]]
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len({visit.shard for visit in visits}) for visits in (first, late)] == [100, 100]
    assert all(step is not None and step > steps // 2 for step in again)
    assert seconds < 1
    assert peak < 50e6
