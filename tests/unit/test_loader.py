"""What a rank is given in each step: one list of rows whatever the ranks, weights known ahead, damage refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from token_stores import EOS, Dataset, documents, layout, make_dataset

from outgrow.contracts import StepRows
from outgrow.errors import DataError, IntegrityError, RunError
from outgrow.streaming.loader import build_loader, build_validation, check_state


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    streams = {
        "books": (documents(1, 130, weighted=True), documents(2, 40, weighted=True)),
        "code": (documents(3, 40), documents(4, 11)),
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
                        for field in ("token_ids", "targets", "weights", "segments", "positions"):
                            assert torch.equal(getattr(batch, field)[i], getattr(other, field)[at])


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
    assert check_state(state, job) == 40
    assert state["epoch"] == 40 // -(-dataset.card.rows // 7)
    with pytest.raises(RunError, match=r"batch\.rows 7, this run has 8"):
        check_state(state, dataset.job(rows=8))
    for key in ("seed", "index_fingerprint"):
        with pytest.raises(RunError, match="the checkpoint was made with"):
            check_state({**state, key: "other"}, job)


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
