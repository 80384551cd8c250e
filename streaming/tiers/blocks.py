"""One file of a store as blocks of bytes, read of a disk or of a bucket. What is read is not trusted: sizes may lie."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Protocol

from outgrow import retry
from outgrow.errors import DataError
from outgrow.storage import BLOCK_BYTES
from outgrow.streaming.manifest import is_inside
from outgrow.streaming.tiers.places import Place

BLOCK_S = 20.0
"""Time that one block of a bucket may take."""
SLOWEST_BYTES_PER_S = 64_000
"""A bucket that is slower than this for ``BLOCK_S`` gets nothing done; the read is broken off."""


class Blocks(Protocol):
    """One file of a place."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes from ``start``, at least one and at most to ``stop``; none where the file ends there. Good until the next
        ``read``."""

    def too_long(self, num_bytes: int) -> bool:
        """Whether the file goes on after ``num_bytes``."""


def check_name(name: str) -> None:
    """Raises ``DataError`` for a file name that could lead out of its store."""
    if not is_inside(name):
        raise DataError(f"given the file name {name!r}; allowed: a path below the store, with / and without ..")


class Pace:
    """How much to ask a bucket for at once: less after a block that took too long, more again after quick ones."""

    def __init__(self) -> None:
        self.block_bytes = BLOCK_BYTES

    def took(self, seconds: float) -> None:
        if seconds < BLOCK_S / 4:
            self.block_bytes = min(2 * self.block_bytes, BLOCK_BYTES)

    def too_slow(self) -> None:
        self.block_bytes = max(self.block_bytes // 2, int(SLOWEST_BYTES_PER_S * BLOCK_S))


@contextmanager
def open_blocks(place: Place, store: str, name: str, pace: Pace) -> Iterator[Blocks]:
    """The file ``name`` of the store ``store``. Raises ``OSError`` where a local one cannot be opened."""
    if not place.is_local:
        yield _BucketBlocks(place, f"{store}/{name}", pace)
        return
    fd = _open_below(place.storage.path(store), name)
    try:
        yield _LocalBlocks(fd)
    finally:
        # Read once on its way to a faster disk: what it displaced from memory would be missed more.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _open_below(folder: str, name: str) -> int:
    """A regular file below a folder for reading; no link on the way there is followed (``ELOOP``, ``ENOTDIR``)."""
    *folders, last = PurePosixPath(name).parts
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            at, above = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at), at
            os.close(above)
        # Without O_NONBLOCK a pipe of that name would be waited for.
        fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


class _LocalBlocks:
    """Read from beginning to end, the next block while this one is worked on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, start: int, stop: int) -> memoryview:
        num_bytes = os.preadv(self._fd, [self._buffer[: stop - start]], start)
        os.posix_fadvise(self._fd, start + num_bytes, BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
        return self._buffer[:num_bytes]

    def too_long(self, num_bytes: int) -> bool:
        return os.fstat(self._fd).st_size > num_bytes


class _BucketBlocks:
    """Read by ranges, each in one attempt."""

    def __init__(self, place: Place, key: str, pace: Pace) -> None:
        self._storage, self._key, self._pace = place.storage, key, pace
        self._is_longer = False

    def read(self, start: int, stop: int) -> memoryview:
        stop = min(stop, start + self._pace.block_bytes)
        began = time.monotonic()
        try:
            # One byte more than is wanted tells a file that is too long, without a request of its own.
            data = self._storage.ask_range(self._key, start, stop + 1, timeout_s=BLOCK_S)
        except Exception as error:
            if retry.kind_of(error) == "timeout":
                self._pace.too_slow()
            raise
        self._pace.took(time.monotonic() - began)
        self._is_longer = len(data) > stop - start
        return memoryview(data)[: stop - start]

    def too_long(self, num_bytes: int) -> bool:
        return self._is_longer
