"""Slots: who gets which, how much room, and that nothing is deleted which outgrow did not copy."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_stores import Dataset, documents, make_dataset

from outgrow.contracts import ShardCounts, TierTraffic
from outgrow.errors import DataError, SiteError
from outgrow.recipes.placed import Placed, record_key
from outgrow.recipes.schema.tiers import Tier
from outgrow.storage import Storage, tree_digests
from outgrow.streaming.tiers import slot as subject
from outgrow.streaming.tiers.lease import QUIET_S, Holder
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.shard_list import ShardFile, ShardList
from outgrow.streaming.tiers.slot import Slot, measured_speeds, remove_unheld, slots, take_slot
from outgrow.streaming.tiers.slot_files import copied_files
from outgrow.streaming.tiers.slot_room import Held, Space, choose_room, left_of_capacity, left_on_disk, to_free

STORE = "datasets/s"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(
        tmp_path_factory.mktemp("slots"), {"a": (documents(1, 90), documents(2, 20)), "b": (documents(3, 40), [])}
    )


@pytest.fixture(scope="module")
def shards(dataset: Dataset) -> ShardList:
    found = ShardList.open(dataset.store, ["a", "b"])
    assert len(found) > 6
    return found


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes of every disk, in a list of one."""
    free = [10**9]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    return free


def place(folder: Path, **tier: Any) -> Place:
    given = Tier.model_validate({"name": "nvme", "path": str(folder), "reserve": "0 B", **tier})
    return Place(name="nvme", storage=Storage(str(folder)), tier=given)


def take(
    hot: Place, run: str = "run", *, store: str = STORE, total: int = 1000, smallest: int = 10, patience: float = 0
) -> Slot:
    return take_slot(hot, store, run=run, dataset_bytes=total, smallest=smallest, patience_s=patience)


def fill(slot: Slot, dataset: Dataset, shards: ShardList, numbers: range) -> int:
    """Copy shards into a slot; their bytes."""
    for number in numbers:
        file = shards.file(number)
        slot.path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dataset.store / file.name, slot.path(file))
    return int(shards.num_bytes[list(numbers)].sum())


def write(folder: Path, name: str, num_bytes: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x" * num_bytes)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


# --- which slot -------------------------------------------------------------------------------------------------------


def test_a_slot_is_one_run_s_until_it_gives_it_back(tmp_path: Path) -> None:
    hot = place(tmp_path)
    with take(hot, "one") as first, take(hot, "two") as second, take(hot, "one", store="datasets/t") as third:
        assert [slot.folder.name for slot in (first, second, third)] == ["s.0", "s.1", "t.0"]
        assert [(state.run, state.leased, state.pid) for state in slots(hot)] == [
            ("one", True, os.getpid()),
            ("two", True, os.getpid()),
            ("one", True, os.getpid()),
        ]
    assert [(state.name, state.store, state.run, state.leased) for state in slots(hot)] == [
        ("s.0", "s", "one", False),
        ("s.1", "s", "two", False),
        ("t.0", "t", "one", False),
    ]


def test_a_run_gets_its_own_slot_back_and_else_the_fullest_of_the_store(tmp_path: Path) -> None:
    hot = place(tmp_path)
    with take(hot, "one"), take(hot, "two") as full, take(hot, "three"), take(hot, "x", store="datasets/t") as other:
        write(full.folder, "streams/a/train/shard.00000.mds", 5)
        write(other.folder, "streams/a/train/shard.00000.mds", 500)
    with take(hot, "three") as again:
        assert again.folder.name == "s.2"
    with take(hot, "four") as adopted:
        assert adopted.folder.name == "s.1"
    assert len(slots(hot)) == 4


def test_commands_leave_the_slots_of_runs_alone(tmp_path: Path) -> None:
    hot = place(tmp_path)
    with take(hot, "run") as slot:
        write(slot.folder, "streams/a/train/shard.00000.mds", 5)
    with take(hot, "") as first:
        assert first.folder.name == "s.1"
    with take(hot, "") as again:
        assert again.folder.name == "s.1"


def test_a_run_waits_for_its_own_dying_prefetcher_and_no_longer_than_that(tmp_path: Path) -> None:
    hot = place(tmp_path)
    held = take(hot, "run")
    threading.Timer(0.3, held.close).start()
    with take(hot, "run", patience=30) as slot:
        assert slot.folder.name == "s.0"
        before = time.monotonic()
        with take(hot, "run", patience=0.3) as other, take(hot, "another", patience=30):
            assert other.folder.name == "s.1"
            assert 0.3 <= time.monotonic() - before < 10


def test_the_holder_on_another_machine_counts_while_it_gives_signs(tmp_path: Path) -> None:
    """As on a network disk whose locks do not reach as far."""
    hot = place(tmp_path)
    take(hot, "run").close()
    lease = tmp_path / "shards/s.0/LEASE"
    Holder(run="run", pid=7, host="elsewhere", boot="another", room_bytes=400).write(lease.parent)
    os.utime(lease)
    assert slots(hot)[0].leased
    with take(hot, "run") as slot:
        assert slot.folder.name == "s.1"
    os.utime(lease, times=(0, time.time() - QUIET_S - 5))
    assert not slots(hot)[0].leased


def test_counts_go_on_with_the_run_and_speeds_are_those_measured_last(tmp_path: Path) -> None:
    hot = place(tmp_path)
    old = ShardCounts(tiers={"hdd": TierTraffic(bytes=100, read_s=1.0), "far": TierTraffic(bytes=30, read_s=2.0)})
    new = ShardCounts(visits=3, tiers={"hdd": TierTraffic(bytes=900, read_s=3.0), "usb": TierTraffic()})
    with take(hot, "one") as first, take(hot, "two") as second:
        for slot, counts, used in ((first, old, 1000), (second, new, 2000)):
            (slot.folder / "counts.json").write_text(json.dumps(counts.to_dict()))
            os.utime(slot.folder / "LEASE", times=(0, used))
        assert measured_speeds(hot) == {"hdd": 300.0, "far": 15.0}
    with take(hot, "two"):
        assert [state.counts for state in slots(hot)] == [old, new]
    with take(hot, "two") as held, take(hot, "three"):
        assert held.folder.name == "s.1"
        assert [state.counts for state in slots(hot)] == [None, new], "what another run has read is not three's"


def test_a_disk_that_is_not_there_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"(?s)tier 'nvme' is not there: .*/mnt does not exist.*mount its disk"):
        take(place(tmp_path / "mnt/outgrow"))
    assert not (tmp_path / "mnt").exists()
    (tmp_path / "mnt").mkdir()
    with pytest.raises(SiteError, match=r"(?s)tier 'nvme' is not there: .*/mnt is empty.*or make the folder .*/mnt/outgrow"):
        take(place(tmp_path / "mnt/outgrow"))
    assert not list((tmp_path / "mnt").iterdir())
    write(tmp_path, "mnt/lost+found", 1)
    take(place(tmp_path / "mnt/outgrow")).close()
    write(tmp_path, "file", 1)
    with pytest.raises(SiteError, match="tier 'nvme' cannot be used: File exists"):
        take(place(tmp_path / "file"))


def test_a_tier_whose_lock_cannot_be_opened_is_refused_in_words(tmp_path: Path) -> None:
    """As where another user made it; root may open that."""
    (tmp_path / "shards/.lock").mkdir(parents=True)
    for use in (take, slots):
        with pytest.raises(SiteError, match=r"(?s)shards: slots cannot be taken or looked at here: .*each user needs a folder"):
            use(place(tmp_path))


# --- what lies in it --------------------------------------------------------------------------------------------------


def test_what_is_present_has_its_size_and_all_else_of_ours_goes(tmp_path: Path, dataset: Dataset, shards: ShardList) -> None:
    with take(place(tmp_path), total=10**6) as slot:
        fill(slot, dataset, shards, range(4))
        first, second = slot.path(shards.file(0)), slot.path(shards.file(1))
        first.write_bytes(first.read_bytes()[:-1])
        second.rename(second.with_name(second.name + ".part"))
        write(slot.folder, "streams/a/train/shard.99999.mds", 5)
        write(slot.folder, "streams/gone/train/shard.00000.mds", 5)
        write(slot.folder, "streams/a/train/notes.txt", 5)
        assert slot.present(shards) == {number: shards.num_bytes[number] for number in (2, 3)}
        kept = {shards.file(number).name for number in (2, 3)}
        assert names(slot.folder) == kept | {"streams/a/train/notes.txt", "LEASE", "lease.json"}


def test_a_slot_can_be_looked_at_while_its_holder_deletes(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, f"streams/a/train/shard.0000{number}.mds", 5)
    files = copied_files(tmp_path)
    first, _ = next(files)
    for path in (tmp_path / "streams/a/train").iterdir():
        path.unlink()
    assert first.startswith("streams/a/train/shard.0000") and list(files) == []


def test_a_smaller_room_keeps_what_fits(tmp_path: Path, dataset: Dataset, shards: ShardList) -> None:
    with take(place(tmp_path), total=10**6) as slot:
        num_bytes = fill(slot, dataset, shards, range(len(shards)))
    with take(place(tmp_path), total=num_bytes - 1) as slot:
        assert set(slot.present(shards)) == set(range(len(shards) - 1))
    with take(place(tmp_path), total=num_bytes) as slot:
        assert set(slot.present(shards)) == set(range(len(shards) - 1))


def test_a_whole_copy_on_the_tier_is_read_under_a_second_name(tmp_path: Path, dataset: Dataset, shards: ShardList) -> None:
    shutil.copytree(dataset.root, tmp_path / "nvme")
    before = tree_digests(tmp_path / "nvme")
    hot = place(tmp_path / "nvme", capacity="1 kB")
    (hot.folder / shards.file(2).name).parent.mkdir(parents=True, exist_ok=True)
    source = hot.folder / STORE / shards.file(3).name
    shutil.copyfile(source, tmp_path / "elsewhere")
    source.unlink()
    source.symlink_to(tmp_path / "elsewhere")
    total = int(shards.num_bytes.sum())
    with take(hot, total=total) as slot:
        assert slot.room_bytes == total
        assert set(slot.present(shards)) == set(range(len(shards))) - {3}, "a link may lead anywhere"
        assert all(
            slot.path(shards.file(n)).samefile(hot.folder / STORE / shards.file(n).name) for n in range(len(shards)) if n != 3
        )
        slot.path(shards.file(0)).unlink()
        assert [(state.num_bytes, state.room_bytes) for state in slots(hot)] == [(0, 0)]
    remove_unheld(hot)
    assert {name: sha for name, sha in tree_digests(hot.folder).items() if not name.startswith("shards/")} == before


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with take(place(tmp_path)) as slot:
        for name in ("/etc/passwd", "streams/../../x", "LEASE", "streams/a\0b"):
            with pytest.raises(DataError, match="cannot be kept under the name"):
                slot.path(ShardFile(name=name, num_bytes=1, sha256=""))


@pytest.fixture
def bystanders(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Files that are not ours, in and about the slots of a tier; unchanged at the end."""
    outside = tmp_path / "outside"
    write(outside, "train/shard.00000.mds", 9)
    folder = tmp_path / "nvme/shards"
    write(folder, "mine/streams/a/train/shard.00000.mds", 9)
    write(folder, "s.5/streams/a/train/shard.00000.mds", 9)
    write(folder, "shard.00000.mds", 9)
    write(tmp_path / "nvme", "shard.00000.mds", 9)
    (folder / "s.6").symlink_to(outside)
    before = tree_digests(tmp_path)
    yield before
    after = tree_digests(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert (folder / "s.6").is_symlink()


@pytest.mark.usefixtures("bystanders")
def test_only_what_we_copied_is_ever_deleted(tmp_path: Path, shards: ShardList) -> None:
    hot, outside = place(tmp_path / "nvme"), tmp_path / "outside"
    taken = [take(hot, str(number)) for number in range(3)]
    for slot in taken:
        slot.close()
    write(taken[0].folder, "streams/a/train/shard.00000.mds", 5)
    write(taken[0].folder, "streams/a/train/photo.jpg", 5)
    write(taken[0].folder, "streams/a/train/deep/shard.00000.mds", 5)
    (taken[0].folder / "streams/a/train/shard.00001.mds").symlink_to(outside / "train/shard.00000.mds")
    (taken[1].folder / "streams").symlink_to(outside)
    (taken[2].folder / "streams").mkdir()
    (taken[2].folder / "streams/a").symlink_to(outside)
    assert [state.name for state in slots(hot)] == ["s.0"], "a slot that a link leads out of is no longer ours"
    assert [state.name for state in remove_unheld(hot, dry_run=True)] == ["s.0"]
    remove_unheld(hot)
    assert names(taken[0].folder) == {
        "streams/a/train/photo.jpg",
        "streams/a/train/deep/shard.00000.mds",
        "streams/a/train/shard.00001.mds",
    }
    with take(hot) as slot:
        assert slot.folder.name == "s.3"
        assert slot.present(shards) == {}
    assert (taken[1].folder / "streams").is_symlink() and (taken[2].folder / "streams/a").is_symlink()


def test_a_held_slot_is_never_removed(tmp_path: Path, disk: list[int]) -> None:
    hot = place(tmp_path)
    with take(hot, "one") as slot:
        write(slot.folder, "streams/a/train/shard.00000.mds", 500)
        disk[0] = 5
        assert remove_unheld(hot) == []
        with pytest.raises(DataError, match="1.0 kB are held by one"):
            take(hot, "two")
        assert names(slot.folder) >= {"streams/a/train/shard.00000.mds"}
    assert len(slots(hot)) == 1, "what was refused left no folder"


# --- how much room ----------------------------------------------------------------------------------------------------


def test_idle_slots_give_up_as_much_as_is_needed_the_oldest_first(tmp_path: Path, disk: list[int]) -> None:
    hot = place(tmp_path)
    for number, store in enumerate(("old", "young")):
        with take(hot, store=store) as slot:
            for shard in range(4):
                write(slot.folder, f"streams/a/train/shard.0000{shard}.mds", 100)
        os.utime(slot.folder / "LEASE", times=(0, 1000 + number))
    disk[0] = 50
    with take(hot, total=350):
        assert [(state.name, state.num_bytes) for state in slots(hot)] == [("old.0", 100), ("s.0", 0), ("young.0", 400)]
    disk[0] = 350
    with take(hot, total=500):
        assert [(state.name, state.num_bytes) for state in slots(hot)] == [("s.0", 0), ("young.0", 300)]


def test_rooms_of_living_runs_never_exceed_capacity_or_disk(tmp_path: Path, disk: list[int]) -> None:
    """Random arrivals and departures; a held slot is filled at random, which takes of the disk."""
    rng, size = np.random.default_rng(0), 5000
    hot = place(tmp_path, capacity="4 kB", reserve="300 B")
    live: list[Slot] = []
    for step in range(60):
        disk[0] = size - sum(state.num_bytes for state in slots(hot))
        if live and rng.random() < 0.4:
            live.pop(int(rng.integers(len(live)))).close()
        else:
            total, smallest = int(rng.integers(100, 3000)), int(rng.integers(10, 100))
            try:
                slot = take(hot, f"run {step}", store=f"datasets/{rng.integers(3)}", total=total, smallest=smallest)
            except DataError:
                continue
            assert smallest <= slot.room_bytes <= total
            live.append(slot)
            shutil.rmtree(slot.folder / "streams", ignore_errors=True)
            write(slot.folder, "streams/a/train/shard.00000.mds", int(rng.integers(slot.room_bytes)))
        assert sum(slot.room_bytes for slot in live) <= 4000
        assert sum(state.num_bytes for state in slots(hot)) <= 4000
    assert len(live) > 1
    for slot in live:
        slot.close()


def space(**given: Any) -> Space:
    return Space(**{"free_bytes": 1000, "own_bytes": 0, "idle_bytes": 0, "placed_bytes": 0, "held": [], **given})


def room(given: Space, *, dataset_bytes: int = 10_000, smallest: int = 10, **tier: Any) -> int:
    own = Tier.model_validate({"name": "nvme", "path": "/nvme", "reserve": "0 B", **tier})
    return choose_room(own, given, dataset_bytes=dataset_bytes, smallest=smallest, where="/nvme/shards")


HELD = Held(name="s.0", run="other", num_bytes=100, room_bytes=300)


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        (space(), {"dataset_bytes": 1000}, 1000),
        (space(), {"dataset_bytes": 1001}, 500),
        (space(), {"dataset_bytes": 1001, "smallest": 700}, 700),
        (space(), {"run_cache": "200 B"}, 200),
        (space(), {"run_cache": "5 kB"}, 1000),
        (space(), {"run_cache": "200 B", "dataset_bytes": 50}, 50),
        (space(), {"reserve": "400 B"}, 300),
        (space(own_bytes=500, idle_bytes=300), {}, 900),
        (space(held=[HELD]), {}, 400),
        (space(held=[HELD]), {"capacity": "800 B"}, 250),
        (space(held=[HELD], placed_bytes=100), {"capacity": "800 B"}, 200),
        (space(held=[dataclasses.replace(HELD, num_bytes=400)]), {"capacity": "800 B"}, 200),
        (space(idle_bytes=5000), {"capacity": "800 B"}, 400),
    ],
)
def test_room_is_the_whole_dataset_or_half_of_what_is_left(given: Space, asked: dict[str, Any], expected: int) -> None:
    assert room(given, **asked) == expected


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        (
            space(held=[HELD], placed_bytes=100),
            {"capacity": "800 B", "smallest": 401},
            r"tier 'nvme' has 400 B left; this run reads 401 B of shards at once\n.*300 B are held by other \(s.0\); 100 B are "
            r"whole copies.*with capacity: 801 B it fits",
        ),
        (
            space(),
            {"reserve": "990 B", "smallest": 11},
            r"has 10 B left.*and 990 B are reserved; with reserve: 989 B it fits",
        ),
        (space(), {"smallest": 1001}, r"has 1.0 kB left.*list a tier on a larger disk first.*smaller data\.window_shards"),
        (space(), {"run_cache": "9 B"}, r"run_cache: of tier 'nvme' is 9 B.*the smallest that works: run_cache: 10 B"),
    ],
)
def test_too_little_room_says_who_has_it_and_what_would_do(given: Space, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)^/nvme/shards: .*{message}"):
        room(given, **asked)


def test_the_way_out_that_is_named_works() -> None:
    given = space(held=[HELD], placed_bytes=100)
    assert room(given, capacity="801 B", smallest=401) == 401
    assert room(space(), reserve="989 B", smallest=11) == 11


def test_no_more_than_is_short_is_freed() -> None:
    tier = Tier.model_validate({"name": "nvme", "path": "/nvme", "reserve": "100 B", "capacity": "900 B"})
    given = space(free_bytes=400, idle_bytes=500, held=[HELD])
    assert (left_on_disk(tier, given), left_of_capacity(tier, given)) == (600, 600)
    assert [to_free(tier, given, wanted) for wanted in (50, 100, 101, 600)] == [0, 0, 1, 500]


def test_placed_copies_are_counted(tmp_path: Path) -> None:
    hot = place(tmp_path, capacity="1000 B")
    assert subject.placed_bytes(hot) == 0
    write(tmp_path, "placed/notes", 3)
    hot.storage.write("placed/datasets+x.json", b"not a record")
    for key in ("datasets/0", "datasets/0/rows-1"):
        record = Placed(key=key, kind="datasets", bytes=300, source="hdd", digest="d", time=0.0)
        hot.storage.write_json(record_key(key), record.to_dict())
    assert subject.placed_bytes(hot) == 600
    with take(hot, total=5000) as slot:
        assert slot.room_bytes == 200
