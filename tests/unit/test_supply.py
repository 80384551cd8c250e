"""What readers are told of shards that lie elsewhere than in the slot, of copies that fail as they are told to."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outgrow.contracts import ShardCounts
from outgrow.streaming.tiers.room import Room
from outgrow.streaming.tiers.supply import Supply

HELD_OUT = 0
NAME = "streams/books/validation/shard.00000.mds"


class Disk:
    """Stands for ``Copies`` of a single shard, on a disk that is full or not."""

    def __init__(self) -> None:
        self.is_full = True
        self.in_memory = 0
        self.slot = SimpleNamespace(room_bytes=100)
        self.traffic = SimpleNamespace(snapshot=dict)
        self.shards = SimpleNamespace(
            streams=["books"],
            num_bytes=np.array([10], np.int64),
            number=lambda stream, split, number: HELD_OUT,
            file=lambda shard: SimpleNamespace(name=NAME),
        )

    def is_whole(self, shard: int) -> bool:
        return False

    def delete(self, shard: int) -> bool:
        return False

    def obtain(self, shard: int) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_elsewhere(self, shard: int) -> Path:
        self.in_memory += 1
        return Path(f"/proc/1/fd/{self.in_memory}")

    def close_elsewhere(self, shard: int) -> None:
        self.in_memory = 0


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def supply(disk: Disk) -> Supply:
    stubs: dict[str, Any] = {"needs": None, "copies": disk}
    return Supply(
        **stubs,
        windows=np.zeros(1, np.int64),
        divide=lambda total: Room(total=total, pinned=10, planned=90, ahead=0, smallest=10),
        pinned=(HELD_OUT,),
        present=(),
        reserve_bytes=0,
        parallel=1,
        counts=ShardCounts(),
    )


def test_what_a_full_disk_has_no_room_for_is_read_elsewhere(disk: Disk, supply: Supply) -> None:
    assert supply.acquire_pinned() == {NAME: Path("/proc/1/fd/1")}
    assert supply.counts().read_through == 1


def test_a_shard_that_is_healed_in_its_place_is_not_read_elsewhere_any_more(disk: Disk, supply: Supply) -> None:
    """Else its reader, who found it damaged there, would be sent back to where it is."""
    supply.acquire_pinned()
    disk.is_full = False
    assert supply.heal("books", "validation", 0, 0) == {}
    assert disk.in_memory == 0
    assert supply.acquire_pinned() == {}


def test_a_shard_that_is_healed_on_a_full_disk_is_read_anew(disk: Disk, supply: Supply) -> None:
    supply.acquire_pinned()
    assert supply.heal("books", "validation", 0, 0) == {NAME: Path("/proc/1/fd/1")}
    assert disk.in_memory == 1
