"""Copies that are read back: on a local disk from the disk itself, not from memory, while the next piece is written."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from outgrow.storage import BLOCK_BYTES, Storage
from outgrow.streaming.tiers.partial import PartialPath

PIECE_BYTES = 64 << 20
"""What is synced and read back at once: on a disk with a head, two seeks each."""
_UNREAD_PIECES = 2


def copy_to_disk(
    source: Storage,
    key: str,
    path: PartialPath,
    *,
    digest_source: bool,
    moved: Callable[[int], None],
) -> tuple[str, str]:
    """sha256 of what was read, where ``digest_source`` asks for it (else empty), and of what the disk holds then.

    Goes on after what an earlier call left in the partial file, which is read back as well. ``moved`` is called with the bytes
    of each block. The bytes are synced, the name is not.
    """
    num_bytes = source.size(key)
    size = os.fstat(path.fd).st_size
    if size > num_bytes:
        os.ftruncate(path.fd, 0)
        size = 0
    read = hashlib.sha256()
    start = 0 if digest_source else size
    with ReadBack(path.fd) as back:
        for block in source_blocks(source, key, start):
            if digest_source:
                read.update(block)
            new = block[max(0, size - start) :]
            start += len(block)
            size = _write(path.fd, new, size)
            moved(len(new))
            back.written(size)
        return read.hexdigest() if digest_source else "", back.digest(size)


def copy_to_bucket(
    source: Storage, key: str, target: Storage, target_key: str, *, moved: Callable[[int], None]
) -> tuple[str, str]:
    """sha256 of what was read, and of what the bucket holds then."""
    read, back = hashlib.sha256(), hashlib.sha256()
    with target.open_write(target_key) as file:
        for block in source_blocks(source, key, 0):
            read.update(block)
            file.write(block)
            moved(len(block))
    for held in target.blocks(target_key):
        back.update(held)
    return read.hexdigest(), back.hexdigest()


def source_blocks(source: Storage, key: str, start: int) -> Iterator[memoryview]:
    """A file from ``start`` on in blocks, each good until the next is asked for."""
    if not source.is_local:
        for block in source.blocks(key, start):
            yield memoryview(block)
        return
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with open(source.path(key), "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        file.seek(start)
        while num_bytes := file.readinto(buffer):
            start += num_bytes
            os.posix_fadvise(file.fileno(), start, BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
            yield buffer[:num_bytes]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def source_digest(source: Storage, key: str) -> str:
    """sha256 of a file as it is now."""
    read = hashlib.sha256()
    for block in source_blocks(source, key, 0):
        read.update(block)
    return read.hexdigest()


class ReadBack:
    """sha256 of what the disk holds of a file, taken by a thread of its own piece by piece behind the one that writes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sha = hashlib.sha256()
        self._asked = 0
        self._pieces: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-back")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def written(self, stop: int) -> None:
        """The file is written up to ``stop``; whole pieces of that are read back. Waits where the thread is far behind."""
        while stop - self._asked >= PIECE_BYTES:
            self._ask(self._asked + PIECE_BYTES)

    def digest(self, stop: int) -> str:
        """Of the whole, which ends at ``stop``. Raises ``OSError`` where the disk gives an error."""
        self._ask(stop)
        for piece in self._pieces:
            piece.result()
        return self._sha.hexdigest()

    def _ask(self, stop: int) -> None:
        self._pieces.append(self._thread.submit(self._read, self._asked, stop))
        self._asked = stop
        while len(self._pieces) > _UNREAD_PIECES:
            self._pieces.popleft().result()

    def _read(self, start: int, stop: int) -> None:
        os.fdatasync(self._fd)
        # Only what is synced can be dropped from memory; what is read next then comes from the disk.
        os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(1, stop - start))))
        while start < stop:
            num_bytes = os.preadv(self._fd, [buffer[: stop - start]], start)
            if not num_bytes:
                return  # shorter than it was written: the digest will tell
            self._sha.update(buffer[:num_bytes])
            start += num_bytes


def _write(fd: int, data: memoryview, at: int) -> int:
    """Where the data ends in the file."""
    while len(data):
        taken = os.pwrite(fd, data, at)
        data, at = data[taken:], at + taken
    return at
