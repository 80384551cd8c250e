"""Bytes of a checkpoint's files, each chunk checked against its digest before a byte of it is handed out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from outgrow.errors import IntegrityError
from outgrow.storage import Storage, digest
from outgrow.trainers.checkpoint.format import Manifest

KEPT_CHUNKS = 64
"""Verified chunks kept in memory: a tensor that 64 ranks saved lies in 64 files, the next one in the same chunks of them."""


class VerifiedFiles:
    """Random reads of the files that a manifest lists. A chunk that is read again after it was dropped is verified again."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def where(self, file: str) -> str:
        return f"{self._folder}/{file}"

    def size(self, file: str) -> int:
        """Bytes of ``file``. Raises ``IntegrityError`` where the manifest does not list it."""
        if file not in self._manifest.files:
            raise IntegrityError("not a file of this checkpoint", where=self.where(file))
        return self._manifest.files[file].size

    def read(self, file: str, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop`` of ``file``, verified. Raises ``IntegrityError``; ``OSError`` where there are none."""
        if not 0 <= start <= stop <= self.size(file):
            raise IntegrityError(f"bytes {start} to {stop} of a file of {self.size(file)}", where=self.where(file))
        wanted = bytearray(stop - start)
        length = self._manifest.chunk_bytes
        for number, chunk in self._chunks(file, start // length, -(-stop // length)):
            begin = number * length
            low, high = max(start, begin), min(stop, begin + len(chunk))
            wanted[low - start : high - start] = memoryview(chunk)[low - begin : high - begin]
        return wanted

    def read_all(self, file: str) -> bytearray:
        return self.read(file, 0, self.size(file))

    def verify(self, file: str) -> None:
        """Read ``file`` through, a chunk at a time. Raises ``IntegrityError`` for the first that differs."""
        for number in range(-(-self.size(file) // self._manifest.chunk_bytes)):
            for _ in self._chunks(file, number, number + 1):
                pass

    def _chunks(self, file: str, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Chunks ``first`` to ``last`` (exclusive) with their numbers; neighbours that are not kept come in one request."""
        number = first
        while number < last:
            kept = self._kept.get((file, number))
            if kept is not None:
                self._kept.move_to_end((file, number))
                yield number, kept
                number += 1
                continue
            stop = next((n for n in range(number, last) if (file, n) in self._kept), last)
            for chunk in self._fetch(file, number, stop):
                self._kept[file, number] = chunk
                if len(self._kept) > KEPT_CHUNKS:
                    self._kept.popitem(last=False)
                yield number, chunk
                number += 1

    def _fetch(self, file: str, first: int, last: int) -> Iterator[bytes]:
        """Chunks ``first`` to ``last`` (exclusive) from the storage, each verified."""
        entry, length = self._manifest.files[file], self._manifest.chunk_bytes
        base = first * length
        data = self._storage.read_range(self.where(file), base, min(last * length, entry.size))
        for number in range(first, last):
            start, stop = number * length, min((number + 1) * length, entry.size)
            chunk = data[start - base : stop - base]
            if len(chunk) != stop - start or digest(chunk) != entry.chunks[number]:
                raise IntegrityError(f"bytes {start} to {stop} differ from their digest", where=self.where(file))
            yield chunk
