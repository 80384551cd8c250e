"""The copied shards of a run on its node's disk: fetched, checked, deleted, or read without a place there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from outgrow.streaming.tiers import slot_files
from outgrow.streaming.tiers.partial import PART
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.shard_list import ShardFile, ShardList
from outgrow.streaming.tiers.slot import Slot
from outgrow.streaming.tiers.transfer import Fetcher


class Copies:
    """The shards of ``shards`` in ``slot``, fetched by ``fetcher`` from ``holders``, where they lie below ``store``. Shards are
    given by number. Its methods may be called by several threads at once, each for another shard."""

    def __init__(self, shards: ShardList, slot: Slot, fetcher: Fetcher, holders: Sequence[Place], store: str) -> None:
        self.shards = shards
        self.slot = slot
        self.traffic = fetcher.traffic
        self._fetcher = fetcher
        self._holders = holders
        self._store = store
        self._in_memory: dict[int, int] = {}

    def obtain(self, shard: int) -> None:
        """Fetch a shard into its place. Raises what ``Fetcher.fetch`` does; where the disk is full, nothing is left behind."""
        file = self.shards.file(shard)
        path = self.slot.path(file)
        try:
            self._fetcher.fetch(file, path)
        except OSError:
            path.with_name(path.name + PART).unlink(missing_ok=True)
            raise

    def is_whole(self, shard: int) -> bool:
        """Whether the copy in the slot has the bytes that its digest tells; all of it is read."""
        file = self.shards.file(shard)
        return _is_whole(self.slot.path(file), file)

    def delete(self, shard: int) -> bool:
        """Whether there was a copy."""
        try:
            self.slot.path(self.shards.file(shard)).unlink()
        except FileNotFoundError:
            return False
        return True

    @property
    def num_bytes(self) -> int:
        """What the copies take of the disk."""
        return slot_files.copied_bytes(self.slot.folder)

    @property
    def free_bytes(self) -> int:
        """What the disk has free for this user."""
        disk = os.statvfs(self.slot.folder)
        return disk.f_bavail * disk.f_frsize

    def open_elsewhere(self, shard: int) -> Path:
        """A path of the shard, found whole, that takes no room of the slot: in a local place that has it, else in memory until
        ``close_elsewhere``. Raises what ``Fetcher.fetch_into`` does."""
        file = self.shards.file(shard)
        if shard in self._in_memory and _has_bytes(self._in_memory[shard], file):
            return _name_of(self._in_memory[shard])
        for holder in self._holders:
            if holder.is_local:
                path = Path(holder.storage.path(f"{self._store}/{file.name}"))
                if self._is_held(holder, path, file):
                    return path
        self.close_elsewhere(shard)
        memory = os.memfd_create("outgrow-shard")
        try:
            self._fetcher.fetch_into(file, memory)
        except BaseException:
            os.close(memory)
            raise
        self._in_memory[shard] = memory
        return _name_of(memory)

    def close_elsewhere(self, shard: int) -> None:
        """Give the memory back; who has mapped the shard keeps it until done."""
        if shard in self._in_memory:
            os.close(self._in_memory.pop(shard))

    def _is_held(self, holder: Place, path: Path, file: ShardFile) -> bool:
        """Whether a local place has a shard whole; all of it is read, and counted."""
        with self.traffic.reading(holder.name):
            whole = _is_whole(path, file)
        if whole:
            self.traffic.bytes_read(holder.name, file.num_bytes)
            self.traffic.shard_read(holder.name)
        return whole


def _is_whole(path: Path, file: ShardFile) -> bool:
    """Whether a file, and no link, can be read, and has the size and the digest of a shard."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _has_bytes(fd, file)
    finally:
        os.close(fd)


def _has_bytes(fd: int, file: ShardFile) -> bool:
    """Whether an open file can be read, and has the size and the digest of a shard."""
    try:
        if os.fstat(fd).st_size != file.num_bytes:
            return False
        with open(fd, "rb", closefd=False) as opened:
            opened.seek(0)
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    except OSError:
        return False


def _name_of(memory: int) -> Path:
    """The name under which other processes open what this one holds in memory."""
    return Path(f"/proc/{os.getpid()}/fd/{memory}")
