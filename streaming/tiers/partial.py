"""A file that grows to its whole under another name, digested as it grows; what a killed process left of it is taken up."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from outgrow.storage import BLOCK_BYTES

PART = ".part"
"""What the name of a file that is not whole yet ends with."""


class PartialFile:
    """Bytes from the beginning of a file, ``size`` of them, in an open file descriptor; ``places`` says where they came from,
    ``""`` among them for those that lay there before.

    Written without a buffer, so that a killed process loses none, and not synced: after a power cut the digest must be checked.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sha = hashlib.sha256()
        self.size = 0
        self.places: set[str] = set()

    def take_up(self, most: int) -> None:
        """Go on after what the file holds; from the beginning where that is more than ``most`` bytes."""
        if os.fstat(self._fd).st_size > most:
            self.restart()
        while data := os.pread(self._fd, BLOCK_BYTES, self.size):
            self._sha.update(data)
            self.size += len(data)
            self.places.add("")

    def append(self, data: memoryview, place: str) -> None:
        """Raises ``OSError`` (``ENOSPC`` among them) where the disk does not take it; what it took is kept."""
        while len(data):
            taken = os.pwrite(self._fd, data, self.size)
            self._sha.update(data[:taken])
            self.size += taken
            self.places.add(place)
            data = data[taken:]

    def restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self._sha = hashlib.sha256()
        self.size = 0
        self.places.clear()

    def digest(self) -> str:
        return self._sha.hexdigest()


class PartialPath:
    """A file open beside ``path`` in a ``with``, with what lay there before; ``commit`` gives it its name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + PART)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        empty = os.fstat(self.fd).st_size == 0
        os.close(self.fd)
        if error is not None and empty:
            self.discard()

    def commit(self) -> None:
        os.replace(self._part, self._path)

    def discard(self) -> None:
        self._part.unlink(missing_ok=True)
