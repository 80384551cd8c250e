"""This rank's folder on the disk that ZeRO offloads to: made anew at every start, gone with the process.

Nothing in it is worth keeping: checkpoints hold the same state whole and verified. A rank that is killed leaves gigabytes
behind; its lock went with it, so whoever starts next on this disk sees that the folder is nobody's and removes it.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import uuid
from pathlib import Path

_LOCK = ".lock"


def claim(parent: Path) -> Path:
    """A new empty folder below ``parent`` that is this process's until it ends. Removes those of processes that have ended."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    while True:
        folder = parent / f"rank-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        lock = folder.with_name(folder.name + _LOCK)
        held = _lock(lock, os.O_CREAT | os.O_EXCL)
        if held is not None:
            break
    folder.mkdir()
    atexit.register(_remove, folder, lock, held)
    return folder


def sweep(parent: Path) -> None:
    """Remove the folders below ``parent`` whose process has ended."""
    for lock in parent.glob(f"rank-*{_LOCK}"):
        try:
            held = _lock(lock, 0)
        except FileNotFoundError:
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
    os.close(descriptor)
    return None


def _remove(folder: Path, lock: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)
    os.close(held)
