"""``events.jsonl``: every record of a run in order, one JSON object a line, written off the step's path.

``write`` puts a record on a bounded queue and returns; a thread appends it. A full disk or a slow bucket never stops a step:
what could not be written is kept and tried again, and what had to be dropped is counted and said in the file itself as soon
as it can be. Restarts append to the same file, so a step that was trained twice stands there twice, each with its attempt.
"""

from __future__ import annotations

import errno
import json
import queue
import threading
import time
from collections.abc import Iterator
from io import SEEK_END, FileIO
from pathlib import Path

from outgrow.contracts import StepRecord
from outgrow.storage import Storage

FILE = "events.jsonl"
QUEUE_RECORDS = 10_000
UPLOAD_INTERVAL_S = 10.0


class EventLog:
    """Appends records to ``<run folder>/events.jsonl``. Open it on one rank alone; ``close`` waits for what is queued.

    On a local folder a line is in the file within moments of ``write``; on a bucket the whole object is put again at most
    every ``UPLOAD_INTERVAL_S`` seconds and at ``close``.
    """

    def __init__(self, storage: Storage, run_folder: str) -> None:
        self._storage = storage
        self._key = f"{run_folder}/{FILE}"
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE_RECORDS)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def write(self, record: StepRecord) -> None:
        """Queue one record; never waits and never raises for the disk's sake."""
        line = json.dumps(record.to_dict(), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is queued; gives up after ``timeout_s`` where the storage does not answer."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        sink = _LocalSink(self._storage, self._key) if self._storage.is_local else _ObjectSink(self._storage, self._key)
        pending: list[bytes] = []
        told = 0
        closing = False
        while not (closing and not pending):
            taken = self._take(wait_s=1.0 if not closing else 0.0)
            closing = closing or None in taken
            pending += [line for line in taken if line is not None]
            if self.dropped > told:
                pending.append(json.dumps({"dropped_records": self.dropped}).encode() + b"\n")
                told = self.dropped
            try:
                sink.append(b"".join(pending), last=closing)
                pending = []
            except Exception:
                # Whatever a store's client raises: the thread must outlive it. The records stay, and are tried again.
                self.dropped += max(0, len(pending) - QUEUE_RECORDS)
                pending = pending[-QUEUE_RECORDS:]
                if closing:
                    return
                time.sleep(1.0)

    def _take(self, wait_s: float) -> list[bytes | None]:
        """All that is queued, after waiting up to ``wait_s`` for the first."""
        taken: list[bytes | None] = []
        try:
            taken.append(self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait())
            while True:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            return taken


class _LocalSink:
    def __init__(self, storage: Storage, key: str) -> None:
        self._path = Path(storage.path(key))
        self._whole = False

    def append(self, data: bytes, *, last: bool) -> None:
        if not data:
            return
        with open(self._path, "ab+", buffering=0) as file:
            if not self._whole:
                self._end_torn_line(file)
            self._whole = False
            size = file.tell()
            if file.write(data) != len(data):
                # A full disk took a part of it: nothing of it must stay, as all of it is written again.
                file.truncate(size)
                raise OSError(errno.ENOSPC, "no room for the record of the run", str(self._path))
        self._whole = True

    @staticmethod
    def _end_torn_line(file: FileIO) -> None:
        """A process that was killed while it wrote leaves half a line; the next record must not grow onto it."""
        if file.seek(0, SEEK_END) > 0:
            file.seek(-1, SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


class _ObjectSink:
    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._content: bytearray | None = None
        self._uploaded = 0
        self._next = 0.0

    def append(self, data: bytes, *, last: bool) -> None:
        if self._content is None:
            self._content = bytearray(self._storage.read(self._key) if self._storage.exists(self._key) else b"")
            self._uploaded = len(self._content)
        self._content += data
        if len(self._content) > self._uploaded and (last or time.monotonic() >= self._next):
            self._next = time.monotonic() + UPLOAD_INTERVAL_S
            size = len(self._content)
            try:
                self._storage.write(self._key, bytes(self._content))
            except Exception:
                if last:
                    raise
                return  # tried again with the next upload
            self._uploaded = size


def read_events(storage: Storage, run_folder: str) -> Iterator[StepRecord]:
    """The records of a run in the order they were written; half lines that a kill left behind are passed over."""
    key = f"{run_folder}/{FILE}"
    if not storage.exists(key):
        return
    for line in storage.read(key).splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if "dropped_records" not in data:
            yield StepRecord.from_dict(data)
