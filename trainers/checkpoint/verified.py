"""Bytes of a checkpoint's files, each chunk checked against its digest before a byte of it is handed out."""

from __future__ import annotations

import threading
from collections import OrderedDict

from outgrow.errors import IntegrityError
from outgrow.storage import Storage, digest
from outgrow.trainers.checkpoint.format import Manifest

KEPT_CHUNKS = 4
"""Verified chunks kept in memory: neighbouring tensors share a chunk, and neighbours are mostly read one after the other."""


class VerifiedFiles:
    """Random reads of the files that a manifest lists. A chunk that is read again after it was dropped is verified again."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._chunks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

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
        for number in range(start // length, -(-stop // length)):
            chunk = self._chunk(file, number)
            begin = number * length
            low, high = max(start, begin), min(stop, begin + len(chunk))
            wanted[low - start : high - start] = memoryview(chunk)[low - begin : high - begin]
        return wanted

    def read_all(self, file: str) -> bytearray:
        return self.read(file, 0, self.size(file))

    def _chunk(self, file: str, number: int) -> bytes:
        with self._lock:
            chunk = self._chunks.get((file, number))
            if chunk is None:
                chunk = self._read_chunk(file, number)
                self._chunks[file, number] = chunk
                if len(self._chunks) > KEPT_CHUNKS:
                    self._chunks.popitem(last=False)
            self._chunks.move_to_end((file, number))
            return chunk

    def _read_chunk(self, file: str, number: int) -> bytes:
        entry, length = self._manifest.files[file], self._manifest.chunk_bytes
        start, stop = number * length, min((number + 1) * length, entry.size)
        chunk = self._storage.read_range(self.where(file), start, stop)
        if len(chunk) != stop - start or digest(chunk) != entry.chunks[number]:
            raise IntegrityError(f"bytes {start} to {stop} differ from their digest", where=self.where(file))
        return chunk
