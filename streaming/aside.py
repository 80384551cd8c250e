"""Folders that a build is still writing, beside the place where they will stand.

Row indexes are made in seconds: their folder is named after the process that writes it, so that a dead one's can be cleared
away. A token store may take days: its folder is named after what is being built, one process at a time holds its lock, and the
next build of the same dataset goes on with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from outgrow.storage import sync_folder
from outgrow.streaming.manifest import is_committed

_PREFIX = ".building-"
_UNFINISHED = ".unfinished-"
_LOCK = "lock"
_BORN_TOLERANCE_MS = 2000
"""A start time is reckoned from the time of boot, which shifts as the clock is set."""


# --- for a short time -------------------------------------------------------------------------------------------------


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


# --- to go on with ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """The folder of a build that has not finished: of dataset ``name``, last written to ``idle_s`` seconds ago."""

    name: str
    folder: Path
    num_bytes: int
    idle_s: float
    in_use: bool


@contextmanager
def building_folder(target: Path, on_wait: Callable[[], None]) -> Iterator[Path | None]:
    """The folder in which ``target`` is built, held by this process alone, with what earlier builds of it finished; None where
    ``target`` is there by now.

    Calls ``on_wait`` once where another process holds it, and waits. The folder stays unless ``discard`` removes it.
    """
    folder = target.parent / f"{_UNFINISHED}{target.name}"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, FileNotFoundError):  # its holder removed the folder just now
            if folder.is_file():
                raise
            continue
        try:
            if not _try_lock(lock):
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_still(lock, folder / _LOCK):
                continue
            if is_committed(target):
                discard(folder)
                yield None
            else:
                yield folder
            return
        finally:
            os.close(lock)


def discard(folder: Path) -> None:
    """Remove the building folder that this process holds; its lock goes last, so that nobody else begins in it before."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / _LOCK).unlink()
    try:
        folder.rmdir()
    except OSError as error:
        # The next build of the same dataset is in it already, or was and has removed it.
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def unfinished(parent: Path) -> list[Unfinished]:
    """The builds in ``parent`` that have not finished, by name."""
    return [_look_at(folder) for folder in sorted(parent.glob(f"{_UNFINISHED}*"))]


def remove_unfinished(build: Unfinished) -> bool:
    """Remove what an unfinished build has made; False where a process is at work on it."""
    lock = os.open(build.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(lock):
            return False
        discard(build.folder)
        return True
    finally:
        os.close(lock)


def _look_at(folder: Path) -> Unfinished:
    states = [path.stat() for path in (folder, *folder.rglob("*"))]
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        return Unfinished(
            name=folder.name.removeprefix(_UNFINISHED),
            folder=folder,
            num_bytes=sum(state.st_size for state in states),
            idle_s=max(0.0, time.time() - max(state.st_mtime for state in states)),
            in_use=not _try_lock(lock),
        )
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(lock: int, path: Path) -> bool:
    """Whether the file that is locked is the one at ``path``: who held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False
