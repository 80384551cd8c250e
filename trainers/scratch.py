"""Folders that a process has for itself and that are gone with it: a rank's on the disk that ZeRO offloads to, an export's
until it is whole.

Nothing in them is worth keeping by itself. A process that is killed leaves gigabytes behind; its lock went with it, so whoever
claims such a folder next in the same place sees that this one is nobody's and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from outgrow.processes import at_end

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Of file systems that know no locks: some of those on a network."""


def claim(parent: Path) -> Path:
    """A rank's new empty folder below ``parent``, its own until it ends. Removes those of ranks that have ended."""
    folder, lock, held = _claim(parent, "rank")
    at_end(partial(_remove, folder, lock, held))
    return folder


@contextmanager
def claimed(parent: Path, name: str) -> Iterator[Path]:
    """A new empty folder ``<name>-...`` below ``parent`` for the time of a ``with``, if it is not renamed before.

    Removes those of the same name whose processes have ended.
    """
    folder, lock, held = _claim(parent, name)
    try:
        yield folder
    finally:
        _remove(folder, lock, held)


def _claim(parent: Path, name: str) -> tuple[Path, Path, int]:
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, name)
    while True:
        folder = parent / f"{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        lock = folder.with_name(folder.name + _LOCK)
        held = _lock(lock, os.O_CREAT | os.O_EXCL)
        if held is not None:
            break
    folder.mkdir()
    return folder, lock, held


def sweep(parent: Path, name: str = "rank") -> None:
    """Remove the folders of that name below ``parent`` whose process has ended; another user's are theirs to remove."""
    for lock in parent.glob(f"{glob.escape(name)}-*{_LOCK}"):
        try:
            held = _lock(lock, 0)
        except (FileNotFoundError, PermissionError):
            continue
        if held is not None:
            _remove(lock.with_name(lock.name.removesuffix(_LOCK)), lock, held)


def _lock(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock until it is closed or the process ends; None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweep may have removed the file between the two lines above.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if flags & os.O_CREAT:  # its own all the same: on such a file system nobody can see that a folder is nobody's
            return descriptor
    os.close(descriptor)
    return None


def _remove(folder: Path, lock: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)
    os.close(held)
