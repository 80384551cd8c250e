"""Holders of slots killed at any moment: nothing leaks, nothing is shared by two, and no file of others is touched."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from outgrow.errors import DataError
from outgrow.recipes.schema.tiers import Tier
from outgrow.storage import Storage, tree_digests
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.slot import SlotState, slots, take_slot

CYCLES = 20


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([take_slot.__module__])
    return context


@pytest.fixture
def hot(tmp_path: Path) -> Iterator[Path]:
    """The folder of a tier with files of others in it, unchanged at the end."""
    folder = tmp_path / "nvme"
    for name in ("datasets/d/streams/a/train/shard.00000.mds", "shards/mine/streams/a/train/shard.00000.mds", "shards/note"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    before = tree_digests(folder)
    yield folder
    after = tree_digests(folder)
    assert {name: after.get(name) for name in before} == before


def tier(folder: Path) -> Place:
    given = Tier(name="nvme", path=str(folder), reserve="0 B", capacity="100 kB")
    return Place(name="nvme", storage=Storage(str(folder)), tier=given)


def hold(folder: Path, store: str, run: str, total: int, patience: float = 10.0) -> None:
    """Take a slot and fill it as a prefetcher does, each shard aside and then renamed, until killed."""
    slot = take_slot(tier(folder), f"datasets/{store}", run=run, dataset_bytes=total, smallest=5000, patience_s=patience)
    own = slot.folder / "streams/a/train"
    own.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        path = own / f"shard.{number % (slot.room_bytes // 1000):05}.mds"
        part = path.with_name(path.name + ".part")
        part.write_bytes(bytes(1000))
        part.rename(path)
        (slot.folder / "counts.json.new").write_text("{}")
        (slot.folder / "counts.json.new").rename(slot.folder / "counts.json")
        number += 1
        time.sleep(0.0005)


def take_and_give_back(folder: Path, store: str, run: str, total: int) -> None:
    """Again and again, with the slots of others in the way."""
    while True:
        try:
            slot = take_slot(tier(folder), f"datasets/{store}", run=run, dataset_bytes=total, smallest=5000, patience_s=0.0)
        except DataError:  # others have the room just now
            continue
        own = slot.folder / "streams/a/train"
        own.mkdir(parents=True, exist_ok=True)
        (own / "shard.00000.mds").write_bytes(bytes(slot.room_bytes))
        slot.close()


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def wait_for(folder: Path, *runs: str) -> list[SlotState]:
    """The slots, once each of ``runs`` holds one with a shard in it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = slots(tier(folder))
        if set(runs) <= {state.run for state in found if state.leased and state.num_bytes}:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{runs} hold no slot: {slots(tier(folder))}")


def test_a_run_that_is_killed_again_and_again_keeps_one_slot(processes: ForkServerContext, hot: Path) -> None:
    for _ in range(CYCLES):
        holder = processes.Process(target=hold, args=(hot, "d", "run", 20_000))
        holder.start()
        (state,) = wait_for(hot, "run")
        assert (state.name, state.pid) == ("d.0", holder.pid)
        time.sleep(random.random() * 0.03)
        kill(holder)
        (state,) = slots(tier(hot))
        assert not state.leased
    with take_slot(tier(hot), "datasets/d", run="run", dataset_bytes=20_000, smallest=5000, patience_s=0) as slot:
        assert slot.folder.name == "d.0"
        assert sorted(path.name for path in slot.folder.iterdir()) == ["LEASE", "counts.json", "lease.json", "streams"]
    assert sorted(path.name for path in (hot / "shards").iterdir()) == [".lock", "d.0", "mine", "note"]


def test_the_next_holder_takes_over_as_soon_as_the_last_one_is_dead(processes: ForkServerContext, hot: Path) -> None:
    first = processes.Process(target=hold, args=(hot, "d", "run", 20_000))
    first.start()
    wait_for(hot, "run")
    second = processes.Process(target=hold, args=(hot, "d", "run", 20_000, 30.0))
    second.start()
    time.sleep(0.5)
    kill(first)
    deadline = time.monotonic() + 30
    while (states := slots(tier(hot)))[0].pid != second.pid and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [(state.name, state.pid, state.leased) for state in states] == [("d.0", second.pid, True)]
    kill(second)


def test_two_runs_have_slots_of_their_own_and_a_stopped_one_keeps_its(processes: ForkServerContext, hot: Path) -> None:
    holders = [processes.Process(target=hold, args=(hot, "d", run, 40_000)) for run in ("one", "two")]
    for holder in holders:
        holder.start()
    states = wait_for(hot, "one", "two")
    assert len({state.folder for state in states}) == 2
    assert sum(state.room_bytes for state in states) <= 100_000
    for _ in range(30):
        assert len(slots(tier(hot))) == 2, "looked at while files come and go"
    assert holders[0].pid is not None
    os.kill(holders[0].pid, signal.SIGSTOP)
    with take_slot(tier(hot), "datasets/d", run="three", dataset_bytes=10_000, smallest=5000, patience_s=0.2) as third:
        assert third.folder not in [state.folder for state in states]
    with pytest.raises(DataError, match="(?s)(?=.*held by one)(?=.*held by two)"):
        take_slot(tier(hot), "datasets/d", run="four", dataset_bytes=90_000, smallest=80_000, patience_s=0)
    for holder in holders:
        kill(holder)


def test_deaths_while_slots_are_taken_and_removed_leave_the_tier_usable(processes: ForkServerContext, hot: Path) -> None:
    """Two stores that do not fit together, so that each taking removes shards of others, and a kill at a random moment."""
    for _ in range(CYCLES):
        takers = [processes.Process(target=take_and_give_back, args=(hot, f"s{n}", f"run {n}", 60_000)) for n in range(2)]
        for taker in takers:
            taker.start()
        time.sleep(0.05 + random.random() * 0.2)
        for taker in takers:
            kill(taker)
        known = slots(tier(hot))
        assert not any(state.leased for state in known)
        assert sum(state.num_bytes for state in known) <= 100_000
    with take_slot(tier(hot), "datasets/s0", run="last", dataset_bytes=100_000, smallest=100_000, patience_s=0) as slot:
        assert slot.room_bytes == 100_000
    left = {path.name for path in (hot / "shards").iterdir()} - {".lock", "mine", "note"}
    # One taken while that of the same store was half removed has the next number.
    assert all(re.fullmatch(r"s[01]\.\d", name) for name in left), left
