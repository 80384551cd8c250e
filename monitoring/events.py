"""``events.jsonl``: every record of a run in order, one JSON object a line, written off the step's path.

``write`` puts a record on a bounded queue and returns; a thread turns it into a line, appends it, and tells whoever listens. A
full disk or a slow bucket never stops a step: what could not be written is kept and tried again, and what had to be dropped is
counted and said in the file itself as soon as it can be. Restarts append to the same file, so a step that was trained twice
stands there twice, each with its attempt. Full files are numbered and bounded as ``event_files`` says.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from outgrow.contracts import JsonDict, StepRecord
from outgrow.monitoring.event_files import LIVE, Sink, line_of, newest_lines, note_line, open_sink, read_lines
from outgrow.storage import Storage

FILE = LIVE
QUEUE_RECORDS = 10_000
UPLOAD_INTERVAL_S = 10.0
_IDLE_S = 1.0

Observer: TypeAlias = Callable[[StepRecord], None]
_Queued: TypeAlias = StepRecord | JsonDict | threading.Event | None
"""A record, a note, someone who waits until the thread has come here, or the end."""


class EventLog:
    """Appends records to ``<run folder>/events.jsonl``. Open it on one rank alone; ``close`` waits for what is queued.

    On a local folder a line is in the file within moments of ``write``; on a bucket the whole object is put again at most
    every ``UPLOAD_INTERVAL_S`` seconds and at ``close``. ``observers`` hear of each record in the log's own thread, in order
    and whatever the disk does; one that raises is not told any more, which the file says.
    """

    def __init__(self, storage: Storage, run_folder: str, observers: Sequence[Observer] = ()) -> None:
        self._storage, self._folder = storage, run_folder
        self._queue: queue.Queue[_Queued] = queue.Queue(QUEUE_RECORDS)
        self._observers = list(observers)
        self._told = 0
        self.dropped = 0
        """Records that the file will never have, so far."""
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def write(self, record: StepRecord) -> None:
        """Queue one record, which nobody may change from here on; never waits and never raises for the disk's sake."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def note(self, **values: Any) -> None:
        """Queue a line that is no record, for a person who reads the file; lost where the queue is full."""
        try:
            self._queue.put_nowait(values)
        except queue.Full:
            return

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until the observers have heard of all that was written so far, ``timeout_s`` at most."""
        reached = threading.Event()
        try:
            self._queue.put(reached, timeout=timeout_s)
        except queue.Full:
            return
        reached.wait(timeout_s)

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

    # --- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        sink: Sink | None = None
        pending: list[bytes] = []
        closing = False
        while not (closing and not pending):
            for value in self._take(wait_s=0.0 if closing else _IDLE_S):
                closing = closing or value is None
                pending += self._lines(value)
            if self.dropped > self._told:
                pending.append(note_line(self.dropped))
                self._told = self.dropped
            try:
                sink = sink or open_sink(self._storage, self._folder, UPLOAD_INTERVAL_S)
                sink.append(b"".join(pending), last=closing)
                pending = []
            except Exception:
                # Whatever a store's client raises: the thread must outlive it. The records stay, and are tried again.
                self.dropped += max(0, len(pending) - QUEUE_RECORDS)
                pending = pending[-QUEUE_RECORDS:]
                if closing:
                    return
                time.sleep(_IDLE_S)

    def _lines(self, value: _Queued) -> Iterator[bytes]:
        """The lines of what was queued, once the observers have heard of it."""
        if isinstance(value, dict):
            yield note_line(self.dropped, **value)
        elif isinstance(value, threading.Event):
            value.set()
        elif value is not None:
            try:
                yield line_of(vars(value))  # its fields as they are: `to_dict` would copy all that is in them first
            except (TypeError, ValueError) as error:
                self.dropped += 1
                yield note_line(self.dropped, error=f"a record of kind {value.kind} is no JSON: {error}")
            for observer in list(self._observers):
                try:
                    observer(value)
                except Exception as error:
                    self._observers.remove(observer)
                    name = getattr(observer, "__qualname__", type(observer).__name__)
                    yield note_line(self.dropped, error=f"{name} is not told any more: {type(error).__name__}: {error}")

    def _take(self, wait_s: float) -> list[_Queued]:
        """All that is queued, after waiting up to ``wait_s`` for the first."""
        taken: list[_Queued] = []
        try:
            taken.append(self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait())
            while True:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            return taken


def read_events(storage: Storage, run_folder: str) -> Iterator[StepRecord]:
    """The records of a run in the order they were written; half lines that a kill left behind are passed over."""
    for line in read_lines(storage, run_folder):
        if "dropped_records" not in line:
            yield StepRecord.from_dict(line)


def newest_counters(storage: Storage, run_folder: str) -> tuple[float, dict[str, float]] | None:
    """Unix time and counters of the newest record that has any; None where there is none. Reads no more than it must."""
    for line in newest_lines(storage, run_folder):
        if counters := line.get("detail", {}).get("counters"):
            return float(line["time"]), dict(counters)
    return None
