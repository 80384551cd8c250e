"""Whoever is killed of those that read through a first tier, the bits of every step are the same and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from tiered_jobs import cached, counts_at_end, digest, originals, prefetchers, read, slots, start_rank, tiered, wait_until_gone
from token_stores import Dataset, documents, layout, make_dataset

from outgrow.errors import TrainingError
from outgrow.streaming.loader import build_loader
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.tiers.room import Room, number_windows
from outgrow.streaming.tiers.shard_list import ShardList

STEPS = 90


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    made = make_dataset(tmp_path_factory.mktemp("hdd"), {"books": (documents(1, 260), []), "code": (documents(3, 90), [])})
    before = originals(made)
    yield made
    assert originals(made) == before, "an original was changed"


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset) -> list[str]:
    return read(dataset.job(), 0, STEPS)


@pytest.fixture(scope="module")
def small(dataset: Dataset) -> str:
    """A cache with which shards come and go all the time."""
    index = RowIndex.open(dataset.index)
    shards = ShardList.open(dataset.store, [stream.name for stream in index.facts.train])
    return f"{2 * Room.divide(0, shards, number_windows(shards, index.facts.window_shards), ()).smallest} B"


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.tiers), 2])
def test_a_killed_prefetcher_is_started_again(
    dataset: Dataset, undisturbed: list[str], small: str, tmp_path: Path, workers: int
) -> None:
    job = tiered(dataset, tmp_path, cache=small, workers=workers)
    found = []
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
        for rows in loader:
            found.append(digest(rows))
            if rows.step in (5, 40):
                (process,) = prefetchers(tmp_path)
                process.kill()
    assert found == undisturbed
    wait_until_gone(tmp_path)
    assert counts_at_end(job).hits > 0
    assert len(slots(job)) == 1
    assert not [path for path in cached(job) if path.suffix == ".part"]


def test_a_killed_worker_is_an_error_and_its_rank_ends_the_prefetcher(dataset: Dataset, small: str, tmp_path: Path) -> None:
    job = tiered(dataset, tmp_path, cache=small, workers=1)
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=10_000)) as loader:
        steps = iter(loader)
        next(steps)
        (worker,) = [p for p in psutil.Process().children() if "read_ahead" in " ".join(p.cmdline())]
        worker.kill()
        with pytest.raises(TrainingError, match="SIGKILL"):
            for _ in steps:
                pass
    wait_until_gone(tmp_path)


def test_a_new_start_of_the_ranks_waits_for_the_end_of_the_old(
    dataset: Dataset, undisturbed: list[str], small: str, tmp_path: Path
) -> None:
    job = tiered(dataset, tmp_path, cache=small)
    old = start_rank(job, tmp_path, 0, 10_000, attempt="first", step_s=0.01)
    try:
        old.wait_for(3)
        with ThreadPoolExecutor() as threads:
            new = threads.submit(read, job, 0, STEPS, attempt="second")
            time.sleep(1)
            assert not new.done()
            old.kill()
            assert new.result(60) == undisturbed
    finally:
        old.kill()


def crash_and_restart(dataset: Dataset, undisturbed: list[str], small: str, folder: Path, cycles: int) -> None:
    """Kill a rank, its workers and the prefetcher at any moment, again and again, and then let it finish."""
    job = tiered(dataset, folder, cache=small, workers=1)
    largest = 0
    for cycle in range(cycles):
        rank = start_rank(job, folder, cycle, STEPS, step_s=0.02)
        try:
            rank.wait_for(1 + cycle % 3)
            if cycle % 2:
                for process in prefetchers(folder):
                    process.kill()
        finally:
            rank.kill()
        assert list(rank.steps.values()) == undisturbed[cycle : cycle + len(rank.steps)]
        wait_until_gone(folder)
        assert len(slots(job)) == 1
        files = sum(path.is_file() for path in (folder / "nvme").rglob("*"))
        largest = max(largest, files) if cycle < 2 else largest
        assert files <= largest + 10, "shards come and go, and nothing else comes"
    assert read(job, 0, STEPS) == undisturbed
    wait_until_gone(folder)
    names = {path.name for path in (folder / "nvme/shards").iterdir()}
    assert names == {".gates", ".lock", "s.0"}
    assert not list((folder / "nvme/shards/.gates").iterdir())
    assert not [path for path in cached(job) if path.suffix != ".mds"]


def test_everything_killed_the_same_command_goes_on(
    dataset: Dataset, undisturbed: list[str], small: str, tmp_path: Path
) -> None:
    crash_and_restart(dataset, undisturbed, small, tmp_path, cycles=2)


@pytest.mark.tiers
def test_twenty_crashes_leave_nothing_behind(dataset: Dataset, undisturbed: list[str], small: str, tmp_path: Path) -> None:
    crash_and_restart(dataset, undisturbed, small, tmp_path, cycles=20)
