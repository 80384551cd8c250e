"""Loaders that read through a first tier, with the real prefetcher: every bit of every step, whatever the cache and whatever
happens to it, and the originals untouched."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fault_proxy import FaultProxy, s3_options, s3_server, s3_storage
from full_disk import small_disk
from tiered_jobs import (
    cached,
    counts_at_end,
    digest,
    flip,
    originals,
    prefetchers,
    read,
    read_validation,
    slots,
    tiered,
    wait_until_gone,
)
from token_stores import Dataset, documents, layout, make_dataset

from outgrow.contracts import JobSpec
from outgrow.errors import DataError, IntegrityError, ShardError
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.storage import tree_digests
from outgrow.streaming.loader import build_loader
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.tiers.needs import Needs
from outgrow.streaming.tiers.room import Room, number_windows, validation_shards
from outgrow.streaming.tiers.schedule import PlanCounts, Schedule
from outgrow.streaming.tiers.shard_list import ShardList

STEPS = 120
"""A little more than two epochs."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    streams = {
        "books": (documents(1, 260, weighted=True), documents(2, 25)),
        "code": (documents(3, 90), documents(4, 9)),
    }
    made = make_dataset(tmp_path_factory.mktemp("hdd"), streams)
    before = originals(made)
    yield made
    assert originals(made) == before, "an original was changed"


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset) -> list[str]:
    """What reading in place gives."""
    return read(dataset.job(), 0, STEPS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """20 shards of 40 kB, whose files take little more of a disk than their bytes."""
    streams = {"books": (documents(5, 400, longest=2000), [])}
    return make_dataset(tmp_path_factory.mktemp("large"), streams, sequence_length=512, shard_bytes=40_000)


@pytest.fixture(autouse=True)
def no_prefetcher_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    wait_until_gone(tmp_path)


def shards_of(dataset: Dataset) -> tuple[ShardList, Room, list[RowIndex]]:
    """The shards, how little room works for them, and the opened index."""
    index = RowIndex.open(dataset.index)
    shards = ShardList.open(dataset.store, [stream.name for stream in index.facts.train])
    windows = number_windows(shards, index.facts.window_shards)
    return shards, Room.divide(0, shards, windows, validation_shards(index, shards, 0)), [index]


def foreseen(dataset: Dataset, cache_bytes: int, stop: int) -> PlanCounts:
    """What the schedule of an undisturbed run counts."""
    shards, _, indexes = shards_of(dataset)
    room = Room.divide(
        cache_bytes, shards, number_windows(shards, indexes[0].facts.window_shards), validation_shards(indexes[0], shards, 0)
    )
    mix = Mix.of(Recipe.model_validate(dataset.job().recipe), dataset.card)
    needs = Needs(indexes, mix, dataset.seed, shards)
    schedule = Schedule(needs, shards.num_bytes, capacity=room.planned, start=0, stop=stop, present={})
    for _ in schedule:
        pass
    return schedule.counts


def smallest(dataset: Dataset) -> int:
    return shards_of(dataset)[1].smallest


@pytest.mark.parametrize(("size", "workers"), [("auto", 0), ("half", 0), ("smallest", 2)])
def test_every_step_is_that_of_reading_in_place(
    dataset: Dataset, undisturbed: list[str], tmp_path: Path, size: str, workers: int
) -> None:
    shards, room, _ = shards_of(dataset)
    cache = {"auto": "auto", "half": f"{shards.num_bytes.sum() // 2} B", "smallest": f"{room.smallest} B"}[size]
    job = tiered(dataset, tmp_path, cache=cache, workers=workers)
    assert read(job, 0, STEPS) == undisturbed
    wait_until_gone(tmp_path)
    counts = counts_at_end(job)
    planned = foreseen(dataset, counts.room_bytes, STEPS)
    assert (counts.visits, counts.hits, counts.misses) == (planned.visits, planned.hits, planned.misses)
    pinned = len(validation_shards(RowIndex.open(dataset.index), shards, 0))
    assert counts.fetches + counts.read_through == planned.misses + pinned
    assert sum(path.stat().st_size for path in cached(job)) <= counts.room_bytes
    assert counts.tiers["storage"].shards == counts.fetches + counts.read_through


def bytes_of(path: Path) -> int:
    """0 where it has been moved or removed since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_the_cache_never_takes_more_than_its_room(dataset: Dataset, tmp_path: Path) -> None:
    room = 2 * smallest(dataset)
    job = tiered(dataset, tmp_path, cache=f"{room} B")
    largest = 0
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
        for _ in loader:
            largest = max(largest, sum(bytes_of(path) for path in cached(job)))
    assert room / 2 < largest <= room


def test_a_cache_below_the_smallest_is_refused_with_what_would_do(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run_cache") as refused:
        read(tiered(dataset, tmp_path, cache=f"{smallest(dataset) - 1} B"), 0, 3)
    assert f"{smallest(dataset):,}" in str(refused.value) or f"{smallest(dataset)} B" in str(refused.value)


def test_ranks_of_a_node_share_each_fetch(dataset: Dataset, tmp_path: Path) -> None:
    room = 2 * smallest(dataset)
    job = tiered(dataset, tmp_path, cache=f"{room} B", workers=1)
    with ThreadPoolExecutor() as threads:
        ranks = [threads.submit(read, job, 0, STEPS, rank=rank, world=2, local_world=2) for rank in range(2)]
        found = [rank.result() for rank in ranks]
    assert found == [read(dataset.job(), 0, STEPS, rank=rank, world=2) for rank in range(2)]
    wait_until_gone(tmp_path)
    counts = counts_at_end(job)
    planned = foreseen(dataset, room, STEPS)
    assert counts.misses == planned.misses
    assert counts.fetches + counts.read_through <= planned.misses + 4, "validation shards, and nothing twice"


def test_a_rank_that_joins_late_finds_what_it_needs(dataset: Dataset, tmp_path: Path) -> None:
    """Nobody said that it would come, and the first steps' shards are long gone."""
    job = tiered(dataset, tmp_path, cache=f"{smallest(dataset)} B")
    with closing(build_loader(job, layout(2), 0, start_step=0, stop_step=STEPS)) as first:
        steps = iter(first)
        ahead = [digest(next(steps)) for _ in range(60)]
        with ThreadPoolExecutor() as threads:
            late = threads.submit(read, job, 0, STEPS, rank=1, world=2)
            ahead += [digest(rows) for rows in steps]
    assert ahead == read(dataset.job(), 0, STEPS, rank=0, world=2)
    assert late.result() == read(dataset.job(), 0, STEPS, rank=1, world=2)


def test_another_run_takes_over_what_one_has_copied(dataset: Dataset, undisturbed: list[str], tmp_path: Path) -> None:
    read(tiered(dataset, tmp_path, run="one"), 0, STEPS)
    wait_until_gone(tmp_path)
    second = tiered(dataset, tmp_path, run="two")
    flip(cached(second)[0])  # it lay there all the time, and who knows
    assert read(second, 0, STEPS) == undisturbed
    wait_until_gone(tmp_path)
    counts = counts_at_end(second)
    assert (counts.misses, counts.fetches, counts.healed) == (0, 1, 1)


def test_two_runs_at_once_do_not_disturb_each_other(
    dataset: Dataset, undisturbed: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two on one store, and one on another."""
    other = under_another_key(make_dataset(tmp_path_factory.mktemp("other"), {"texts": (documents(7, 150), [])}))
    cache = f"{smallest(dataset)} B"
    jobs = [tiered(dataset, tmp_path, cache=cache, run=run) for run in ("one", "two")]
    jobs.append(tiered(other, tmp_path, cache=cache, run="three"))
    with ExitStack() as held:
        loaders = [held.enter_context(closing(build_loader(job, layout(1), 0, start_step=0, stop_step=60))) for job in jobs]
        assert len(prefetchers(tmp_path)) == len(slots(jobs[0])) == 3
        found = [[digest(rows) for rows in steps] for steps in zip(*loaders, strict=True)]
    assert found == [list(steps) for steps in zip(undisturbed, undisturbed, read(other.job(), 0, 60), strict=False)]


def test_a_whole_copy_on_the_first_tier_is_read_and_never_changed(
    dataset: Dataset, undisturbed: list[str], tmp_path: Path
) -> None:
    """It takes no room again, a damaged shard of it is read from elsewhere, and it stays as it is."""
    shutil.copytree(dataset.root / "datasets", tmp_path / "nvme/datasets")
    flip(tmp_path / "nvme/datasets/s/streams/books/train/shard.00002.mds")
    copy = tree_digests(tmp_path / "nvme/datasets")
    job = tiered(dataset, tmp_path, reserve="1000 TB")
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
        steps = iter(loader)
        found = [digest(next(steps)) for _ in range(20)]
        time.sleep(1.5)  # a reserve that the disk does not have is no reason to give up what takes none of it
        found += [digest(rows) for rows in steps]
    assert found == undisturbed
    wait_until_gone(tmp_path)
    assert tree_digests(tmp_path / "nvme/datasets") == copy
    assert counts_at_end(job).healed == 1


def under_another_key(dataset: Dataset) -> Dataset:
    """The dataset moved, so that its store is not that of the other tests'."""
    dataset.store.rename(dataset.root / "datasets/other")
    indexes = [replace(index, folder=index.folder.replace("/s/", "/other/")) for index in dataset.card.indexes]
    return replace(dataset, card=replace(dataset.card, store="datasets/other", indexes=tuple(indexes)))


# --- held-out rows ----------------------------------------------------------------------------------------------------


def test_held_out_rows_are_read_with_and_without_a_loader(dataset: Dataset, tmp_path: Path) -> None:
    job = tiered(dataset, tmp_path, cache=f"{smallest(dataset)} B")
    in_place = read_validation(dataset.job())
    assert len(in_place) > 2
    assert read_validation(job) == in_place
    wait_until_gone(tmp_path)
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
        for rows in loader:
            if rows.step % 40 == 0:
                assert read_validation(job) == in_place


def test_a_held_out_shard_that_is_damaged_everywhere_is_an_error_of_validation_alone(
    tmp_path: Path, undisturbed: list[str], dataset: Dataset
) -> None:
    bad = copied_dataset(dataset, tmp_path / "bad")
    flip(bad.store / "streams/books/validation/shard.00000.mds")
    job = tiered(bad, tmp_path)
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=20)) as loader:
        steps = iter(loader)
        assert digest(next(steps)) == undisturbed[0]
        with pytest.raises(IntegrityError) as told:
            read_validation(job)
        assert not isinstance(told.value, ShardError)
        assert [digest(rows) for rows in steps] == undisturbed[1:20]


# --- damage -----------------------------------------------------------------------------------------------------------


def copied_dataset(dataset: Dataset, root: Path) -> Dataset:
    """The dataset once more, to be damaged."""
    shutil.copytree(dataset.root, root)
    return replace(dataset, root=root)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.tiers)])
def test_copies_that_are_damaged_between_visits_are_healed(
    dataset: Dataset, undisturbed: list[str], tmp_path: Path, workers: int
) -> None:
    """Bits that rot, without a trace in the file's times; files that vanish; and files that are cut short."""
    job = tiered(dataset, tmp_path, workers=workers)
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
        steps = iter(loader)
        found = [digest(next(steps)) for _ in range(50)]
        workers_of_mine = psutil.Process().children() if workers else []
        for worker in workers_of_mine:
            worker.suspend()
        in_use = mapped_files()
        for number, path in enumerate(cached(job)):
            times = path.stat()
            if str(path) not in in_use:
                flip(path)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if number % 3 == 1:
                path.unlink()
            elif number % 3 == 2:
                replace_by_half(path)
        for worker in workers_of_mine:
            worker.resume()
        found += [digest(rows) for rows in steps]
    assert found == undisturbed
    wait_until_gone(tmp_path)
    assert counts_at_end(job).healed > 3


def mapped_files() -> set[str]:
    """What this process and its loader workers read right now."""
    own = psutil.Process()
    return {mapped.path for process in (own, *own.children()) for mapped in process.memory_maps()}


def replace_by_half(path: Path) -> None:
    """Another file of the name, cut short; the one that may be mapped stays what it was."""
    half = path.with_suffix(".half")
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    half.replace(path)


def test_a_damaged_original_is_passed_over_for_a_whole_one(dataset: Dataset, undisturbed: list[str], tmp_path: Path) -> None:
    shutil.copytree(dataset.root / "datasets", tmp_path / "usb/datasets")
    first = copied_dataset(dataset, tmp_path / "hdd")
    for path in sorted(first.store.glob("streams/*/train/*.mds"))[::5]:
        flip(path)
    job = tiered(
        first, tmp_path, more_tiers=[{"name": "hdd", "path": str(first.root)}, {"name": "usb", "path": str(tmp_path / "usb")}]
    )
    assert read(job, 0, STEPS) == undisturbed
    wait_until_gone(tmp_path)
    tiers = counts_at_end(job).tiers
    assert tiers["hdd"].errors.get("corrupt", 0) > 3
    assert tiers["usb"].shards > 3


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.tiers)])
def test_a_shard_that_no_place_has_whole_stops_the_step_that_needs_it(
    dataset: Dataset, undisturbed: list[str], tmp_path: Path, workers: int
) -> None:
    bad = copied_dataset(dataset, tmp_path / "bad")
    flip(bad.store / "streams/books/train/shard.00003.mds")

    def steps_before_error(job: JobSpec) -> tuple[list[str], ShardError]:
        found = []
        with (
            pytest.raises(ShardError) as told,
            closing(build_loader(job, layout(1), 0, start_step=0, stop_step=STEPS)) as loader,
        ):
            for rows in loader:
                found.append(digest(rows))
        return found, told.value

    in_place, said = steps_before_error(bad.job())
    through, told = steps_before_error(tiered(bad, tmp_path, workers=workers))
    assert (said.stream, said.shard) == (told.stream, told.shard) == ("books", 3)
    assert through == in_place == undisturbed[: len(through)]
    assert "shard.00003.mds" in str(told)


# --- a bucket ---------------------------------------------------------------------------------------------------------


def test_steps_go_on_while_a_bucket_is_gone_and_what_has_no_room_is_read_through_memory(
    dataset: Dataset, undisturbed: list[str], tmp_path: Path
) -> None:
    """With a whole epoch in the cache no reader waits for the bucket; without, they wait until it is back."""
    with s3_server() as server, FaultProxy(server) as proxy:
        storage = s3_storage(proxy.url)
        for path in sorted(path for path in dataset.store.rglob("*") if path.is_file()):
            storage.upload(path, f"datasets/s/{path.relative_to(dataset.store)}")

        def from_bucket(cache: str, run: str) -> JobSpec:
            job = tiered(dataset, tmp_path, cache=cache, run=run)
            bucket = {"storage": storage.root_url, "storage_options": s3_options(proxy.url)}
            return replace(job, site={**job.site, **bucket})

        warm = from_bucket("auto", "warm")
        with closing(build_loader(warm, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
            steps = iter(loader)
            found = [digest(next(steps)) for _ in range(60)]
            time.sleep(1.5)  # the counts are that old at most
            before = loader.shard_counts()
            assert before is not None and before.fetches == len(cached(warm))
            with proxy.absent():
                found += [digest(rows) for rows in steps]
        assert found == undisturbed
        wait_until_gone(tmp_path)
        assert counts_at_end(warm).wait_s - before.wait_s < 0.5
        shutil.rmtree(tmp_path / "nvme")

        cold = from_bucket(f"{smallest(dataset)} B", "cold")
        with closing(build_loader(cold, layout(1), 0, start_step=0, stop_step=STEPS)) as loader:
            steps = iter(loader)
            found = [digest(next(steps)) for _ in range(20)]
            with proxy.absent():
                time.sleep(1)
            found += [digest(rows) for rows in steps]
        assert found == undisturbed
        wait_until_gone(tmp_path)
        assert counts_at_end(cold).read_through > 0
        assert not any("planted-secret" in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


# --- a disk with less room than it had --------------------------------------------------------------------------------


@contextmanager
def filling(path: Path) -> Iterator[None]:
    """The file at ``path`` takes all room on its disk, and every byte that comes free there, until the ``with`` ends."""
    ended = threading.Event()

    def fill() -> None:
        with open(path, "wb", buffering=0) as file:
            while not ended.is_set():
                with suppress(OSError):
                    file.write(bytes(4096))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        while shutil.disk_usage(path.parent).free:
            time.sleep(0.01)
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink()


def test_a_disk_that_others_fill_is_given_up_step_by_step(large: Dataset, tmp_path: Path) -> None:
    """Nothing is left for the cache in the end, and all is read in place of the original."""
    in_place = read(large.job(), 0, 60)
    with small_disk(tmp_path / "nvme", 2**20):
        job = tiered(large, tmp_path, cache="250 kB", workers=1)
        with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=60)) as loader:
            steps = iter(loader)
            found = [digest(next(steps)) for _ in range(3)]
            with filling(tmp_path / "nvme/other"):
                found += [digest(rows) for rows in steps]
        assert found == in_place
        wait_until_gone(tmp_path)
        assert counts_at_end(job).read_through > 0


def test_a_reserve_that_others_use_up_is_restored(large: Dataset, tmp_path: Path) -> None:
    in_place = read(large.job(), 0, 60)
    with small_disk(tmp_path / "nvme", 2**21):
        job = tiered(large, tmp_path, cache="800 kB", reserve="1 MiB")
        with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=60)) as loader:
            steps = iter(loader)
            found = [digest(next(steps)) for _ in range(50)]
            (tmp_path / "nvme/other").write_bytes(bytes(600_000))
            assert shutil.disk_usage(tmp_path / "nvme").free < 2**20
            deadline = time.monotonic() + 5
            while shutil.disk_usage(tmp_path / "nvme").free < 2**20:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            found += [digest(rows) for rows in steps]
        assert found == in_place


def test_a_prefetcher_that_has_ended_is_reaped_by_whoever_started_it(dataset: Dataset, tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    job = tiered(dataset, tmp_path)
    with closing(build_loader(job, layout(1), 0, start_step=0, stop_step=2)) as loader:
        next(iter(loader))
        started = {child.pid for child in psutil.Process().children()} - before
        assert started, "the prefetcher is a child of the one that started it"
    wait_until_gone(tmp_path)
    deadline = time.monotonic() + 5
    while started & {child.pid for child in psutil.Process().children()}:  # a zombie is a child still
        assert time.monotonic() < deadline
        time.sleep(0.02)
