"""Folders that a build is still writing, named after the process that writes them, so that a dead one's can be cleared away."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from outgrow.storage import sync_folder
from outgrow.streaming.manifest import is_committed

_PREFIX = ".building-"
_BORN_TOLERANCE_MS = 2000
"""A start time is reckoned from the time of boot, which shifts as the clock is set."""


@contextmanager
def aside_folder(parent: Path) -> Iterator[Path]:
    """A new empty folder in ``parent`` for the time of a ``with``; whatever was not renamed away is removed at its end."""
    folder = parent / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{_born(os.getpid())}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> bool:
    """Rename a committed folder to ``target``, durably; False where another process put its own there first."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_committed(target):
            raise
        return False
    sync_folder(target.parent)
    return True


def remove_abandoned(parent: Path) -> int:
    """How many folders of dead processes of this machine were removed from ``parent``; other machines' are left alone."""
    removed = 0
    for folder in parent.glob(f"{_PREFIX}*"):
        host, pid, born = folder.name.removeprefix(_PREFIX).rsplit("-", 2)
        if host == socket.gethostname() and not _is_alive(int(pid), int(born)):
            shutil.rmtree(folder)
            removed += 1
    return removed


def _born(pid: int) -> int:
    """When a process started, ms of Unix time, to tell it from a later one of the same number."""
    return int(psutil.Process(pid).create_time() * 1000)


def _is_alive(pid: int, born: int) -> bool:
    try:
        return abs(_born(pid) - born) <= _BORN_TOLERANCE_MS
    except psutil.NoSuchProcess:
        return False
