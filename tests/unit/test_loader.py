"""What a rank is given in each step: one list of rows whatever the ranks, weights known ahead, damage refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from token_stores import EOS, Dataset, documents, layout, make_dataset, pair

from outgrow.contracts import Batch, StepRows
from outgrow.errors import DataError, IntegrityError, RunError
from outgrow.recipes.mix import Mix
from outgrow.streaming.loader import build_loader, build_validation, check_state

PREFERENCES = {"kind": "jsonl", "path": "choices", "shape": {"kind": "preference"}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    streams = {
        "books": (documents(1, 130, weighted=True), documents(2, 40, weighted=True)),
        "code": (documents(3, 43), documents(4, 11)),
    }
    return make_dataset(tmp_path_factory.mktemp("loader"), streams)


def steps_of(dataset: Dataset, world: int, start: int, stop: int, **job: Any) -> list[list[StepRows]]:
    """The steps of every rank."""
    plan = layout(world, rows=job.get("rows", 7))
    loaders = [build_loader(dataset.job(**job), plan, rank, start_step=start, stop_step=stop) for rank in range(world)]
    return [list(loader) for loader in loaders]


def rows_of_step(ranks: list[list[StepRows]], step: int) -> list[int]:
    """Row ids as the ranks really got them, put back in order: row j is on rank j mod world."""
    own = [[int(r) for batch in rank[step].micro_batches for r in batch.row_ids if r >= 0] for rank in ranks]
    total = sum(map(len, own))
    return [own[place % len(ranks)][place // len(ranks)] for place in range(total)]


@pytest.fixture(scope="module")
def straight(dataset: Dataset) -> list[StepRows]:
    """Two epochs and a bit on one rank."""
    stop = 2 * -(-dataset.card.rows // 7) + 3
    return steps_of(dataset, 1, 0, stop)[0]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 9])
def test_the_rows_of_a_step_are_one_list_for_any_number_of_ranks(
    dataset: Dataset, straight: list[StepRows], world: int
) -> None:
    ranks = steps_of(dataset, world, 0, len(straight))
    for step, expected in enumerate(straight):
        assert rows_of_step(ranks, step) == list(expected.row_ids)
        for rank in ranks:
            assert (rank[step].row_ids, rank[step].global_weight, rank[step].tokens) == (
                expected.row_ids,
                expected.global_weight,
                expected.tokens,
            )
            assert len(rank[step].micro_batches) == layout(world).accumulation


def test_each_row_comes_once_an_epoch(dataset: Dataset, straight: list[StepRows]) -> None:
    assert dataset.card.rows % 7, "the last step of an epoch must be short"
    for epoch in (0, 1):
        rows = [row for step in straight if step.epoch == epoch for row in step.row_ids]
        assert sorted(rows) == list(range(dataset.card.rows))


def test_resuming_at_an_odd_step_on_other_ranks_gives_the_same_bits(dataset: Dataset, straight: list[StepRows]) -> None:
    start = dataset.card.rows // 7 + 2  # in the second epoch
    for world in (1, 3):
        for rank, steps in enumerate(steps_of(dataset, world, start, start + 4)):
            for step in steps:
                whole = {int(b.row_ids[i]): (b, i) for b in straight[step.step].micro_batches for i in range(len(b.row_ids))}
                for batch in step.micro_batches:
                    for i, row in enumerate(batch.row_ids.tolist()):
                        if row < 0:
                            continue
                        assert step.row_ids.index(row) % world == rank
                        other, at = whole[row]
                        assert bits(batch, i) == bits(other, at)


def test_the_global_weight_is_the_sum_over_all_ranks(dataset: Dataset) -> None:
    ranks = steps_of(dataset, 3, 0, 6)
    for step in range(6):
        batches = [batch for rank in ranks for batch in rank[step].micro_batches]
        weight = sum(float(batch.weights.sum(dtype=torch.float64)) for batch in batches)
        tokens = sum(int((batch.segments[batch.row_ids >= 0] >= 0).sum()) for batch in batches)
        assert ranks[0][step].global_weight == pytest.approx(weight, rel=1e-12)
        assert ranks[0][step].tokens == tokens


def test_types_are_those_of_the_contract_and_idle_rows_weigh_nothing(dataset: Dataset) -> None:
    ranks = steps_of(dataset, 9, 0, 1)
    for rank, steps in enumerate(ranks):
        (batch,) = steps[0].micro_batches
        assert [t.dtype for t in (batch.token_ids, batch.targets, batch.positions, batch.row_ids)] == [torch.int64] * 4
        assert (batch.weights.dtype, batch.segments.dtype) == (torch.float32, torch.int32)
        assert batch.token_ids.shape == batch.targets.shape == batch.positions.shape == (1, 32)
        if rank >= 7:
            assert batch.row_ids.tolist() == [-1]
            assert batch.weights.sum() == 0
            assert (batch.targets == -100).all()
            assert (batch.token_ids == EOS).all()
            assert (batch.segments == 0).all()


def test_validation_reads_every_row_of_each_stream_the_same_every_time(dataset: Dataset) -> None:
    for max_rows, expected in [(0, dataset.card.validation_rows), (5, 10)]:
        ranks = [build_validation(dataset.job(max_rows=max_rows), layout(2), rank) for rank in range(2)]
        first = [(name, step.row_ids) for name, step in ranks[0]]
        assert first == [(name, step.row_ids) for name, step in ranks[0]] == [(name, s.row_ids) for name, s in ranks[1]]
        assert [name for name, _ in first] == sorted(name for name, _ in first)
        rows = [row for _, ids in first for row in ids]
        assert len(set(rows)) == len(rows) == expected
        assert {name for name, _ in first} == {"books", "code"}
        got = [int(r) for rank in ranks for _, step in rank for b in step.micro_batches for r in b.row_ids if r >= 0]
        assert sorted(got) == sorted(rows)


def test_state_goes_on_from_its_step_and_refuses_other_rows(dataset: Dataset) -> None:
    job = dataset.job()
    loader = build_loader(job, layout(1), 0, start_step=0, stop_step=1)
    state = loader.state(40)
    assert json.loads(json.dumps(state)) == state
    assert check_state(state, job) == 40
    assert state["epoch"] == 40 // -(-dataset.card.rows // 7)
    with pytest.raises(RunError, match=r"batch\.rows 7, this run has 8"):
        check_state(state, dataset.job(rows=8))
    with pytest.raises(RunError, match=r"run\.seed 9, this run has 5"):
        check_state({**state, "seed": 9}, job)
    with pytest.raises(RunError, match=r"row index 0123456789abcdef, this run has \w{16}"):
        check_state({**state, "index_fingerprint": "0123456789abcdef0123"}, job)
    with pytest.raises(RunError, match=r"row index None, this run has"):
        check_state({"step": 40}, job)
    data = job.recipe["data"] | {"streams": [stream | {"epochs": 2} for stream in job.recipe["data"]["streams"]]}
    with pytest.raises(RunError, match=r"a mix of streams \(epochs, share, stages\) \w{16}, this run has \w{16}"):
        check_state(state, dataset.job(data=data))
    with pytest.raises(RunError, match="a mix of streams"):
        check_state(state, dataset.job(data=job.recipe["data"] | {"stages": [{"shares": {"books": 1}}]}, duration=DURATION))


# --- stages -----------------------------------------------------------------------------------------------------------

STAGES = [
    {"tokens": 8 * 7 * 32, "shares": {"books": 0.7, "code": 0.3}},
    {"tokens": 6 * 7 * 64, "shares": {"books": 0.5, "code": 0.5}, "sequence_length": 64},
    {"shares": {"code": 1}},
]
STAGED_STEPS = 20
DURATION = {"steps": STAGED_STEPS}


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Rows of 32 tokens for 8 steps, of 64 for 6, and again of 32."""
    streams = {"books": (documents(1, 130, weighted=True), documents(2, 9)), "code": (documents(3, 43), documents(4, 9))}
    return make_dataset(tmp_path_factory.mktemp("staged"), streams, data={"stages": STAGES})


@pytest.fixture(scope="module")
def staged_straight(staged: Dataset) -> list[StepRows]:
    return steps_of(staged, 1, 0, STAGED_STEPS, duration=DURATION)[0]


def bits(batch: Batch, at: int) -> dict[str, bytes]:
    """Every field of one row of a batch."""
    return {field.name: getattr(batch, field.name)[at].numpy().tobytes() for field in fields(Batch)}


def row_bits(ranks: list[list[StepRows]], step: int) -> list[dict[str, bytes]]:
    """The rows of a step in order, from the ranks that were given them."""
    own = [
        [bits(b, at) for b in rank[step].micro_batches for at in range(len(b.row_ids)) if b.row_ids[at] >= 0] for rank in ranks
    ]
    return [own[place % len(ranks)][place // len(ranks)] for place in range(sum(map(len, own)))]


def test_stages_change_the_length_of_rows_and_read_other_indexes(staged: Dataset, staged_straight: list[StepRows]) -> None:
    assert [index.sequence_length for index in staged.card.indexes] == [32, 64]
    lengths = [{batch.token_ids.shape[1] for batch in step.micro_batches} for step in staged_straight]
    assert lengths == [{32}] * 8 + [{64}] * 6 + [{32}] * 6
    assert all(step.epoch == 0 and len(step.row_ids) == 7 for step in staged_straight)
    books = staged.card.indexes[0].streams[0].rows
    assert all(row >= books for step in staged_straight[14:] for row in step.row_ids), "the last stage is code alone"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [5, 8, 11, 15])
def test_resuming_in_a_stage_on_other_ranks_gives_the_same_rows_bit_by_bit(
    staged: Dataset, staged_straight: list[StepRows], world: int, start: int
) -> None:
    """From the middle of each stage, and from the first step of the second, which lays the rows of the first into others."""
    ranks = steps_of(staged, world, start, STAGED_STEPS, duration=DURATION)
    for at, expected in enumerate(staged_straight[start:]):
        assert rows_of_step(ranks, at) == list(expected.row_ids)
        assert row_bits(ranks, at) == row_bits([[expected]], 0)
        assert {(r[at].step, r[at].global_weight, r[at].tokens) for r in ranks} == {
            (start + at, expected.global_weight, expected.tokens)
        }


def test_validation_in_a_run_in_stages_reads_rows_of_the_datasets_own_length(staged: Dataset) -> None:
    for _, step in build_validation(staged.job(duration=DURATION), layout(2), 0):
        assert {batch.token_ids.shape[1] for batch in step.micro_batches} == {32}


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_preference_pairs_reach_the_batch_as_two_segments_with_their_number(tmp_path: Path) -> None:
    pairs = [pair(seed, prompt=4, chosen=3 + seed % 5, rejected=6, source=f"p{seed}") for seed in range(9)]
    streams = {"chats": (documents(3, 20, longest=30), []), "choices": (pairs, [])}
    options = {"choices": {"split": "never", "source": PREFERENCES}}
    dataset = make_dataset(tmp_path, streams, sequence_length=64, options=options)
    steps = steps_of(dataset, 2, 0, Mix.of(dataset.recipe(), dataset.card).steps_per_epoch)
    found = []
    for batch in (batch for rank in steps for step in rank for batch in step.micro_batches):
        assert batch.pairs.dtype == torch.int32
        assert batch.pairs.shape == batch.token_ids.shape
        for row in range(len(batch.row_ids)):
            for number in range(int(batch.pairs[row].max()) // 2 + 1):
                halves = [batch.pairs[row] == 2 * number + answer for answer in (0, 1)]
                segments = [set(batch.segments[row][half].tolist()) for half in halves]
                assert [len(s) for s in segments] == [1, 1] and segments[0] != segments[1]
                for half in halves:
                    assert batch.positions[row][half].tolist() == list(range(int(half.sum())))
                    # The prompt is not learned, nor does either half's last token predict anything.
                    learned = (batch.weights[row][half] > 0).tolist()
                    assert learned == [False] * 3 + [True] * (len(learned) - 4) + [False]
                found.append(batch.token_ids[row][halves[0] | halves[1]].tolist())
            others = batch.pairs[row] < 0
            assert not others.all() or int(batch.row_ids[row]) < dataset.card.indexes[0].streams[0].rows
    assert sorted(found) == sorted(p.tokens.tolist() for p in pairs)


def damaged(tmp_path: Path, **store: Any) -> tuple[Dataset, Path]:
    dataset = make_dataset(tmp_path, {"books": (documents(1, 130), [])}, **store)
    shard = sorted((dataset.store / "streams/books/train").glob("shard.00001*"))[0]
    return dataset, shard


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_byte_in_a_shard_is_refused_by_name(tmp_path: Path, compression: str) -> None:
    dataset, shard = damaged(tmp_path, compression=compression)
    assert len(steps_of(dataset, 1, 0, 5)[0]) == 5
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="shard.00001.*digest"):
        steps_of(dataset, 1, 0, dataset.card.rows // 7)


def test_missing_truncated_and_linked_shards_are_refused_by_name(tmp_path: Path) -> None:
    dataset, shard = damaged(tmp_path)
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match="shard.00001.*bytes"):
        steps_of(dataset, 1, 0, dataset.card.rows // 7)
    shard.unlink()
    with pytest.raises(IntegrityError, match="shard.00001.*missing"):
        steps_of(dataset, 1, 0, dataset.card.rows // 7)
    (tmp_path / "elsewhere").write_bytes(data)
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="shard.00001.*link"):
        steps_of(dataset, 1, 0, dataset.card.rows // 7)


def test_a_dataset_that_is_not_on_this_node_says_which_node_and_the_way_out(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="(?s)node .* has no dataset datasets/s .*storage: in site.yaml to a URL"):
        build_loader(dataset.job(storage=str(tmp_path)), layout(1), 0, start_step=0, stop_step=1)
