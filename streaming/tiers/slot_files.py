"""What lies in the folder of a slot, and taking it away: copied shards and the slot's own records, and nothing else.

Files are told by their names. Links are never followed, and what outgrow does not write stays, and so does its folder.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from outgrow.streaming.tiers.lease import LEASE, RECORD

COUNTS = "counts.json"
"""What reading through the slot has cost: ``ShardCounts`` as JSON, written aside and renamed by the holder."""
STREAMS = "streams"
"""Copied shards lie below this, at their paths in the store: ``streams/<stream>/<split>/shard.00000.mds``."""

_OWN_FILE = re.compile(rf"\.?({LEASE}|{re.escape(RECORD)}|{re.escape(COUNTS)})(\.[\w.-]+)?")
_SHARD_FILE = re.compile(r"\.?shard\.\d{5,}\.mds(\.zstd)?(\.part|\.[\w.-]+\.tmp)?")
_DEPTH = 3


def is_slot(folder: Path) -> bool:
    """Whether the folder is a slot of ours: with a lease, and no link on the way to a shard."""
    if folder.is_symlink() or not _is_file(folder / LEASE):
        return False
    return not any(entry.is_symlink() for depth in range(_DEPTH) for entry in _entries(folder, depth))


def copied_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name below the slot, and state, of every copied shard in it, whole or in part."""
    for entry in _entries(folder, _DEPTH):
        if _SHARD_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            try:
                state = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # the holder has just deleted or renamed it
                continue
            yield os.path.relpath(entry.path, folder), state


def copied_bytes(folder: Path) -> int:
    """What deleting the copied shards would set free; a shard with another name elsewhere takes no room."""
    return sum(state.st_size for _, state in copied_files(folder) if state.st_nlink == 1)


def remove_asides(folder: Path) -> None:
    """Delete what is left of the slot's own files that a dead process was about to replace."""
    for entry in list(os.scandir(folder)):
        own = entry.name in (LEASE, RECORD, COUNTS)
        if not own and _OWN_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def shrink(folder: Path, num_bytes: int) -> int:
    """Bytes set free by deleting copied shards until they are ``num_bytes`` or none is left, and then the slot too; nobody
    holds it, and the tier is locked."""
    freed = 0
    for name, state in sorted(copied_files(folder), reverse=True):
        if freed >= num_bytes:
            return freed
        (folder / name).unlink()
        freed += state.st_size if state.st_nlink == 1 else 0
    remove(folder)
    return freed


def remove(folder: Path) -> None:
    """Delete the slot, its lease last; nobody holds it, and the tier is locked. What is not ours stays."""
    for name, _ in list(copied_files(folder)):
        (folder / name).unlink(missing_ok=True)
    for depth in reversed(range(_DEPTH)):
        for entry in list(_entries(folder, depth)):
            if entry.is_dir(follow_symlinks=False):
                _remove_empty(Path(entry.path))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name == LEASE):
        if _OWN_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
    _remove_empty(folder)


def _entries(folder: Path, depth: int) -> Iterator[os.DirEntry[str]]:
    """Everything ``depth`` folders below ``streams``; depth 0: ``streams`` itself."""
    level = [entry for entry in os.scandir(folder) if entry.name == STREAMS]
    for _ in range(depth):
        level = [below for entry in level if entry.is_dir(follow_symlinks=False) for below in os.scandir(entry)]
    yield from level


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
