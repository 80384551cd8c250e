"""Shards that no place has whole: which rows become empty, what a step weighs then, and what a run writes down."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_stores import Dataset, documents, layout, make_dataset, pair

from outgrow.contracts import StepRows
from outgrow.errors import IntegrityError, RestartError, ShardError
from outgrow.recipes.identity import differences, fingerprint
from outgrow.recipes.mix import Mix
from outgrow.storage import Storage
from outgrow.streaming.catalog import section_key
from outgrow.streaming.loader import build_loader
from outgrow.streaming.lost_shards import LostShard, lost_documents
from outgrow.streaming.quarantine import ShardLoss, answer, describe, most_lost, read_losses, read_lost
from outgrow.streaming.row_windows import Span, Window
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.sampler import Sampler
from outgrow.streaming.tiers.needs import Needs
from outgrow.streaming.tiers.shard_list import ShardList

OPTIONS: dict[str, dict[str, Any]] = {
    "books": {},
    "code": {"split": "never", "too_long": "split"},
    "queue": {"order": "sequential"},
    "pairs": {"split": "never"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Streams laid in every way; several windows of two shards in each, and two lengths of rows."""
    pairs = [pair(seed, prompt=3, chosen=5, rejected=4) for seed in range(150)]
    streams = {
        "books": (documents(1, 130, weighted=True), documents(2, 20)),
        "code": (documents(3, 143, weighted=True), documents(4, 11)),
        "queue": (documents(5, 120), documents(6, 5)),
        "pairs": (pairs, pairs[:3]),
    }
    options = {name: dict(given) for name, given in OPTIONS.items()}
    options["pairs"] |= {"source": {"kind": "jsonl", "path": "p", "shape": {"kind": "preference"}}}
    stages = [
        {"tokens": 40 * 7 * 32, "shares": {"books": 0.3, "code": 0.3, "queue": 0.2, "pairs": 0.2}},
        {"shares": {"books": 1}, "sequence_length": 64},
    ]
    return make_dataset(tmp_path_factory.mktemp("quarantine"), streams, options=options, data={"stages": stages})


@pytest.fixture(scope="module")
def shards(dataset: Dataset) -> ShardList:
    return ShardList.open(dataset.store, sorted(OPTIONS))


def lost(*shards: tuple[str, int]) -> tuple[LostShard, ...]:
    return tuple(LostShard(stream=stream, shard=shard) for stream, shard in shards)


SOME = lost(("books", 1), ("code", 0), ("books", 4), ("pairs", 2))


def touches(spans: Sequence[Span], documents: Sequence[range]) -> bool:
    return any(span.document in own for span in spans for own in documents)


# --- which rows become empty ------------------------------------------------------------------------------------------


def test_the_documents_of_a_shard_are_those_that_its_own_count_tells(dataset: Dataset, shards: ShardList) -> None:
    found = lost_documents(dataset.store, SOME)
    assert set(found) == {"books", "code", "pairs"}
    samples = shards.tables[sorted(OPTIONS).index("books")].samples.tolist()
    assert found["books"] == [range(samples[0], sum(samples[:2])), range(sum(samples[:4]), sum(samples[:5]))]
    assert found["code"][0].start == 0
    assert lost_documents(dataset.store, ()) == {}


@pytest.mark.parametrize("stream", sorted(OPTIONS))
def test_a_row_is_empty_when_it_touches_what_is_lost_and_else_what_it_was(dataset: Dataset, stream: str) -> None:
    rng = np.random.default_rng(len(stream))
    rows = {split.name: split for split in RowIndex.open(dataset.index).train}[stream]
    emptied = 0
    for number in range(len(rows.window_rows) - 1):
        whole = rows.window(number)
        last = whole.first + int(whole.order.max())
        for _ in range(30):
            first, other = (int(at) for at in rng.integers(max(0, whole.first - 3), last + 3, 2))
            documents = [range(first, first + int(rng.integers(0, 6))), range(other, other + 1)]
            window = whole.without(documents)
            expected = [whole.spans(row) for row in range(whole.num_rows)]
            expected = [[] if touches(spans, documents) else spans for spans in expected]
            assert [window.spans(row) for row in range(window.num_rows)] == expected
            assert np.diff(window.cuts).tolist() == [sum(span.length for span in spans) for spans in expected]
            assert window.weights.tolist() == [
                weight if spans else 0.0 for weight, spans in zip(whole.weights.tolist(), expected, strict=True)
            ]
            if window is whole:
                continue
            assert window.ends.tolist() == np.cumsum([span.length for spans in expected for span in spans]).tolist()
            assert (window.order.dtype, window.starts.dtype, window.ends.dtype) == (np.uint32, np.uint32, np.int64)
            assert len(window.order) == len(window.starts) == len(window.ends)
            emptied += sum(not spans for spans in expected)
    assert emptied > 20


def test_a_window_may_lose_all_and_one_that_loses_nothing_is_left_alone(dataset: Dataset) -> None:
    window = RowIndex.open(dataset.index).train[0].window(0)
    assert window.without([range(10**6, 10**6 + 5), range(0)]) is window
    nothing = window.without([range(10**6)])
    assert (nothing.num_rows, nothing.num_tokens, nothing.weights.sum()) == (window.num_rows, 0, 0)
    assert [nothing.spans(row) for row in range(nothing.num_rows)] == [[]] * window.num_rows
    assert Window.decode(nothing.encode()).spans(0) == []


def test_an_index_opened_without_lost_shards_says_what_is_left(dataset: Dataset) -> None:
    whole, left = (RowIndex.open(dataset.index, documents) for documents in (None, lost_documents(dataset.store, SOME)))
    assert left.facts == whole.facts
    assert left.first_rows("train").tolist() == whole.first_rows("train").tolist()
    for before, after in zip(whole.train, left.train, strict=True):
        rows = np.arange(before.num_rows)
        each = [(after.weight(row), after.tokens(row)) for row in rows.tolist()]
        assert after.sums(rows) == pytest.approx((sum(weight for weight, _ in each), sum(tokens for _, tokens in each)))
        assert after.sums(rows) == before.sums(rows) if after.name == "queue" else after.sums(rows) < before.sums(rows)
    for before, after in zip(whole.validation, left.validation, strict=True):
        assert after.sums(np.arange(after.num_rows)) == before.sums(np.arange(before.num_rows))


# --- what a step is then ----------------------------------------------------------------------------------------------


def steps_of(dataset: Dataset, world: int, stop: int, shards: tuple[LostShard, ...]) -> list[list[StepRows]]:
    plan = layout(world)
    loaders = [build_loader(dataset.job(), plan, rank, start_step=0, stop_step=stop, lost=shards) for rank in range(world)]
    return [list(loader) for loader in loaders]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_is_the_same_step_with_the_lost_rows_as_padding(dataset: Dataset, world: int) -> None:
    stop = 50  # the last ten with rows of the other length
    gone = lost_documents(dataset.store, SOME)
    whole, left = (steps_of(dataset, world, stop, shards) for shards in ((), SOME))
    empty = 0
    for step in range(stop):
        index = RowIndex.open(dataset.root / dataset.card.indexes[step >= 40].folder)
        firsts = index.first_rows("train")
        weight = tokens = 0.0
        for before, after in zip((rank[step] for rank in whole), (rank[step] for rank in left), strict=True):
            assert after.row_ids == before.row_ids
            for old, new in zip(before.micro_batches, after.micro_batches, strict=True):
                assert torch.equal(old.row_ids, new.row_ids)
                weight += float(new.weights.double().sum())
                for place, row_id in enumerate(new.row_ids.tolist()):
                    if row_id < 0:
                        continue
                    owner = int(np.searchsorted(firsts, row_id, "right")) - 1
                    spans = index.train[owner].spans(row_id - int(firsts[owner]))
                    if touches(spans, gone.get(index.train[owner].name, ())):
                        empty += 1
                        assert new.weights[place].sum() == 0
                        assert (new.targets[place] == -100).all()
                        assert (new.token_ids[place] == dataset.card.eos_token_id).all()
                        assert (new.segments[place] == 0).all(), "a row of -1 alone would make attention divide by 0"
                    else:
                        tokens += sum(span.length for span in spans)
                        for field in dataclasses.fields(new):
                            assert torch.equal(getattr(new, field.name)[place], getattr(old, field.name)[place])
        assert len({(rank[step].global_weight, rank[step].tokens) for rank in left}) == 1
        assert left[0][step].global_weight == pytest.approx(weight, rel=1e-6)
        assert left[0][step].tokens == tokens
    assert empty > 30


def test_no_step_needs_a_lost_shard_any_more(dataset: Dataset, shards: ShardList) -> None:
    """Tiers plan by the same windows; the shards that shared rows with it may be needed less."""
    mix = Mix.of(dataset.recipe(), dataset.card)
    numbers = {shards.number(sorted(OPTIONS).index(shard.stream), "train", shard.shard) for shard in SOME}
    needed = {}
    for gone in ((), SOME):
        folders = [dataset.root / index.folder for index in dataset.card.indexes]
        indexes = [RowIndex.open(folder, lost_documents(dataset.store, gone)) for folder in folders]
        needs = Needs(indexes, mix, dataset.seed, shards)
        needed[gone] = {(visit.shard, step) for visit in needs.visits(0, 60) for step in visit.steps.tolist()}
        assert needed[gone] == set(needed_step_by_step(dataset, indexes, shards, mix))
    assert needed[SOME] < needed[()]
    assert len({shard for shard, _ in needed[()]} & numbers) >= 3
    assert not {shard for shard, _ in needed[SOME]} & numbers


def needed_step_by_step(
    dataset: Dataset, indexes: Sequence[RowIndex], shards: ShardList, mix: Mix
) -> Iterator[tuple[int, int]]:
    """Shard and step, by looking at each row of each step."""
    sampler = Sampler(indexes, mix, dataset.seed)
    for step in range(60):
        index = indexes[sampler.phase(step).index]
        firsts = index.first_rows("train")
        for row_id in sampler.row_ids(step):
            owner = int(np.searchsorted(firsts, row_id, "right")) - 1
            for span in index.train[owner].spans(row_id - int(firsts[owner])):
                shard = int(np.searchsorted(shards.documents(owner, "train"), span.document, "right"))
                yield shards.number(owner, "train", shard), step


def test_the_choice_makes_no_other_dataset_and_no_other_run(dataset: Dataset) -> None:
    recipe = dataset.recipe()
    data = {**recipe.to_dict(), "data": {**recipe.to_dict()["data"], "on_bad_shard": "quarantine"}}
    other = type(recipe).model_validate(data)
    assert section_key(other) == section_key(recipe)
    assert fingerprint(other, "d") == fingerprint(recipe, "d")
    (difference,) = differences(recipe.to_dict(), other.to_dict())
    assert (difference.key, difference.verdict) == ("data.on_bad_shard", "extend")


# --- what a run does about it -----------------------------------------------------------------------------------------


def bad(stream: str, shard: int) -> ShardError:
    return ShardError("the bytes differ from their sha256 digest", stream=stream, shard=shard, where="/s/shard.mds")


def answered(dataset: Dataset, run: str, error: ShardError, shards: tuple[LostShard, ...] = ()) -> Exception:
    job = dataset.job()
    job.recipe["data"]["on_bad_shard"] = "quarantine"
    return answer(error, dataclasses.replace(job, run=dataclasses.replace(job.run, folder=f"runs/{run}")), shards)


def losses(dataset: Dataset, run: str) -> tuple[ShardLoss, ...]:
    return read_losses(Storage(str(dataset.root)), f"runs/{run}")


def test_the_default_is_to_stop_and_to_say_both_ways_on(dataset: Dataset) -> None:
    stopped = answer(bad("books", 1), dataset.job(), ())
    assert isinstance(stopped, ShardError)
    assert (stopped.stream, stopped.shard) == ("books", 1)
    assert str(stopped) == (
        "/s/shard.mds: shard 1 of stream 'books' is whole in no place: the bytes differ from their sha256 digest\n"
        "  repair it: outgrow data verify names every damaged file, outgrow data place shows which places have a whole one; "
        "or go on without its rows: the same command with data.on_bad_shard=quarantine"
    )
    assert not losses(dataset, "test")


def test_what_is_given_up_is_written_down_row_by_row(dataset: Dataset) -> None:
    said = answered(dataset, "listed", bad("code", 2))
    assert isinstance(said, RestartError)
    (loss,) = losses(dataset, "listed")
    assert (loss.stream, loss.shard, loss.file) == ("code", 2, "streams/code/train/shard.00002.mds")
    assert loss.reason == "the bytes differ from their sha256 digest"
    documents = lost_documents(dataset.store, lost(("code", 2)))["code"][0]
    assert range(loss.first_document, loss.after_document) == documents
    for rows, card in zip(loss.rows, dataset.card.indexes, strict=True):
        assert (rows.index, rows.sequence_length) == (card.fingerprint, card.sequence_length)
        index = RowIndex.open(dataset.root / card.folder)
        first, stream = int(index.first_rows("train")[1]), index.train[1]
        gone = [row for row in range(stream.num_rows) if touches(stream.spans(row), [documents])]
        assert rows.row_ids == tuple(first + row for row in gone)
        assert rows.tokens == sum(stream.tokens(row) for row in gone)
        assert rows.weight == pytest.approx(sum(stream.weight(row) for row in gone))
    assert describe(loss) in str(said)
    assert describe(loss).startswith(f"{len(loss.rows[0].row_ids)} rows of 32 (")
    assert read_lost(Storage(str(dataset.root)), "runs/listed") == lost(("code", 2))


def test_a_second_loss_counts_no_row_again_and_a_second_finder_changes_nothing(dataset: Dataset) -> None:
    answered(dataset, "twice", bad("books", 0))
    answered(dataset, "twice", bad("books", 0))
    answered(dataset, "twice", bad("books", 1), lost(("books", 0)))  # of the same window
    first, second = losses(dataset, "twice")
    assert not set(first.rows[0].row_ids) & set(second.rows[0].row_ids)
    both = RowIndex.open(dataset.index, lost_documents(dataset.store, lost(("books", 0), ("books", 1)))).train[0].window(0)
    assert sorted(first.rows[0].row_ids + second.rows[0].row_ids) == np.flatnonzero(np.diff(both.cuts) == 0).tolist()


def test_a_run_gives_up_no_more_than_its_limit(dataset: Dataset, shards: ShardList) -> None:
    assert [most_lost(count) for count in (1, 2, 9, 32, 40, 1600, 1700, 100_000)] == [0, 1, 4, 16, 16, 16, 17, 1000]
    total = sum(len(shards.numbers(stream, "train")) for stream in range(4))
    limit = most_lost(total)
    before = tuple(LostShard(stream="books", shard=100 + number) for number in range(limit))
    stopped = answered(dataset, "limit", bad("code", 2), before)
    assert type(stopped) is IntegrityError
    assert f"a run may give up {limit} of {total} training shards, and this one has given up {limit}" in str(stopped)
    assert not losses(dataset, "limit")


def test_a_shard_that_was_given_up_and_is_read_all_the_same_ends_the_run(dataset: Dataset) -> None:
    stopped = answered(dataset, "again", bad("code", 2), lost(("code", 2)))
    assert type(stopped) is IntegrityError
    assert "was read although the run has given it up" in str(stopped)


def test_a_record_that_tells_no_loss_is_refused_and_a_half_written_one_is_passed_over(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_losses(storage, "runs/x") == ()
    storage.write("runs/x/quarantine/.a.00001.json.7.7.tmp", b'{"stre')
    assert read_losses(storage, "runs/x") == ()
    for text in (b"", b"[]", b'{"stream": "a"}', b"\xff", b'"a"'):
        storage.write("runs/x/quarantine/a.00001.json", text)
        with pytest.raises(IntegrityError, match=r"runs/x/quarantine/a\.00001\.json: this is no ShardLoss"):
            read_losses(storage, "runs/x")
