"""Folders that a build is still writing, named after the process that writes them, so that a dead one's can be cleared away."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PREFIX = ".building-"


@contextmanager
def aside_folder(parent: Path) -> Iterator[Path]:
    """A new empty folder in ``parent`` for the time of a ``with``; whatever was not renamed away is removed at its end."""
    folder = parent / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{_born(os.getpid())}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> int:
    """How many folders of dead processes of this machine were removed from ``parent``; other machines' are left alone."""
    removed = 0
    for folder in parent.glob(f"{_PREFIX}*"):
        host, pid, born = folder.name.removeprefix(_PREFIX).rsplit("-", 2)
        if host == socket.gethostname() and _born(int(pid)) != int(born):
            shutil.rmtree(folder)
            removed += 1
    return removed


def _born(pid: int) -> int:
    """When a process started, ms of Unix time, to tell it from a later one of the same number; 0 where there is none."""
    try:
        return int(psutil.Process(pid).create_time() * 1000)
    except psutil.NoSuchProcess:
        return 0
