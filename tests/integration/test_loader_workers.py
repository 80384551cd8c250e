"""Loader workers as real processes: the same bits as without them, errors that arrive, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch
from datasets_of_cards import card, index_card, recipe
from token_stores import Dataset, documents, layout, make_dataset

from outgrow.contracts import Batch, JobSpec, StepRows
from outgrow.errors import IntegrityError, TrainingError
from outgrow.recipes.mix import Mix
from outgrow.streaming.loader import build_loader
from outgrow.streaming.read_ahead import read_ahead_depth
from outgrow.streaming.steps import ReadPlan


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    streams = {"books": (documents(1, 130, weighted=True), []), "code": (documents(3, 40), [])}
    return make_dataset(tmp_path_factory.mktemp("workers"), streams)


def read(job: JobSpec, world: int, rank: int, start: int, stop: int) -> list[StepRows]:
    loader = build_loader(job, layout(world), rank, start_step=start, stop_step=stop)
    try:
        return list(loader)
    finally:
        loader.close()


def equal(one: StepRows, other: StepRows) -> bool:
    facts = ("step", "epoch", "row_ids", "global_weight", "tokens")
    tensors = tuple(field.name for field in fields(Batch))
    return all(getattr(one, name) == getattr(other, name) for name in facts) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
        for name in tensors
    )


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "outgrow.streaming.read_ahead" in " ".join(p.cmdline())]


@pytest.mark.parametrize(("world", "rank", "start"), [(1, 0, 0), (3, 2, 11)])
def test_two_workers_give_the_bits_of_none_across_epochs(dataset: Dataset, world: int, rank: int, start: int) -> None:
    stop = 2 * -(-dataset.card.rows // 7) + 2
    without = read(dataset.job(workers=0), world, rank, start, stop)
    ahead = read(dataset.job(workers=2), world, rank, start, stop)
    assert [step.step for step in ahead] == list(range(start, stop))
    assert all(equal(one, other) for one, other in zip(without, ahead, strict=True))
    assert not children()


def test_workers_go_through_stages_of_other_lengths(tmp_path: Path) -> None:
    """Three workers, each of which meets every stage; steps come in order whatever their length."""
    stages = [
        {"tokens": 4 * 7 * 32, "shares": {"books": 1}},
        {"tokens": 4 * 7 * 64, "shares": {"books": 0.5, "code": 0.5}, "sequence_length": 64},
        {"shares": {"code": 1}},
    ]
    streams = {"books": (documents(1, 130, weighted=True), []), "code": (documents(3, 40), [])}
    staged = make_dataset(tmp_path, streams, data={"stages": stages})
    duration = {"steps": 12}
    without = read(staged.job(workers=0, duration=duration), 2, 1, 1, 12)
    ahead = read(staged.job(workers=3, duration=duration), 2, 1, 1, 12)
    assert [step.micro_batches[0].token_ids.shape[1] for step in ahead] == [32] * 3 + [64] * 4 + [32] * 4
    assert all(equal(one, other) for one, other in zip(without, ahead, strict=True))


def test_a_killed_worker_is_an_error_within_seconds(dataset: Dataset) -> None:
    loader = build_loader(dataset.job(workers=1), layout(1), 0, start_step=0, stop_step=10_000)
    steps = iter(loader)
    next(steps)
    (worker,) = children()
    worker.send_signal(signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(TrainingError, match=rf"loader worker {worker.pid} was ended by SIGKILL"):
        for _ in steps:
            pass
    assert time.monotonic() - start < 3
    loader.close()
    assert not children()


def test_damage_that_a_worker_finds_is_the_same_error_as_without_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"books": (documents(1, 130), [])})
    shard = dataset.store / "streams/books/train/shard.00001.mds"
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError) as ahead:
        read(dataset.job(workers=2), 1, 0, 0, 15)
    with pytest.raises(IntegrityError) as without:
        read(dataset.job(workers=0), 1, 0, 0, 15)
    assert str(ahead.value) == str(without.value)
    assert not children()


def test_a_slow_rank_is_not_run_ahead_of_without_bound(dataset: Dataset) -> None:
    loader = build_loader(dataset.job(workers=1), layout(1), 0, start_step=0, stop_step=10_000)
    next(iter(loader))
    (worker,) = children()
    before = -1.0
    while (spent := worker.cpu_times().user) != before:
        before = spent
        time.sleep(0.5)
    loader.close()  # ends a worker that is waiting for room
    assert not children()


def test_steps_ahead_are_bounded_in_bytes() -> None:
    def depth(*lengths: int) -> int:
        stages: list[dict[str, object]] = [{"shares": {"a": 1}, "sequence_length": length, "tokens": 1} for length in lengths]
        del stages[-1]["tokens"]
        dataset = card(*(index_card(length, {"a": (9, 9)}) for length in lengths))
        mix = Mix.of(recipe(64, length=lengths[0], stages=stages), dataset)
        own = layout(1, rows=64, micro_rows=4)
        return read_ahead_depth(ReadPlan(store="", indexes=(), mix=mix, layout=own, rank=0, seed=0, fill_token=0))

    assert depth(2048) == 8
    assert depth(16_384) == 7
    assert depth(2048, 16_384, 512) == 7, "the longest rows decide"
    assert depth(32_768) == 3
    assert depth(1_048_576) == 1


def train_forever(path: str) -> None:
    """A rank that tells its worker's pid and takes steps until it is killed."""
    job = JobSpec.from_dict(json.loads(Path(path).read_text()))
    loader = build_loader(job, layout(1), 0, start_step=0, stop_step=10**9)
    steps = iter(loader)
    next(steps)
    print(children()[0].pid, flush=True)
    for _ in steps:
        time.sleep(0.01)


def test_workers_end_and_leave_no_shared_memory_when_their_rank_is_killed(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(dataset.job(workers=1).to_dict()))
    shared_memory = set(os.listdir("/dev/shm"))
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import train_forever; train_forever(sys.argv[1])"
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job.json")], stdout=subprocess.PIPE)
    assert rank.stdout is not None
    worker = psutil.Process(int(rank.stdout.readline()))
    left = set(os.listdir("/dev/shm")) - shared_memory
    rank.kill()
    rank.wait()
    rank.stdout.close()
    worker.wait(timeout=5)
    assert not any("outgrow" in name or name.startswith("torch_") for name in left)


def _read_in_a_thread(job: JobSpec, connection: object) -> None:
    result: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: result.extend(step.row_ids for step in read(job, 1, 0, 0, 3)))
    thread.start()
    thread.join()
    connection.send(result)  # type: ignore[attr-defined]


def test_workers_start_from_a_thread_of_a_daemonic_process(dataset: Dataset) -> None:
    """As under Ray Train, which trains in a thread, and under launchers that mark their ranks as daemons."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_in_a_thread, args=(dataset.job(workers=1), theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == [step.row_ids for step in read(dataset.job(workers=0), 1, 0, 0, 3)]
    process.join()
