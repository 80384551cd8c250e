"""The seam of trackers, and the threads between them and a run.

A tracker may be slow, raise, or never return: records wait for it in a queue of their own, and one that cannot be helped is
dropped, which is said once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from outgrow.contracts import StepRecord

QUEUE_RECORDS = 1000
BUSY_S = 120.0
"""A tracker that has been opening, or has had one record, for so long is dropped."""
CLOSE_S = 20.0
"""Longest wait for all trackers together at the end of a run."""


class Tracker(Protocol):
    """Whoever shows the records of one run. All calls come from one thread; what is raised drops the tracker."""

    def record(self, record: StepRecord) -> None: ...
    def close(self) -> None:
        """What was given is kept; there is no call after it."""


OpenTracker: TypeAlias = Callable[[], Tracker]
OnGone: TypeAlias = Callable[[str, str], None]
"""Told once that a tracker is dropped: its name, and why."""


class Tracking:
    """The trackers of one run, each opened and told in its own thread."""

    def __init__(self, trackers: Mapping[str, OpenTracker], on_gone: OnGone) -> None:
        self._lanes = [_Lane(name, open_tracker, on_gone) for name, open_tracker in trackers.items()]

    def tell(self, record: StepRecord) -> None:
        """Hand a record on; never waits."""
        for lane in self._lanes:
            lane.tell(record)

    def close(self) -> None:
        """Wait until every tracker has what it was told, ``CLOSE_S`` at most."""
        deadline = time.monotonic() + CLOSE_S
        for lane in self._lanes:
            lane.end()
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))


class _Lane:
    """One tracker behind its queue."""

    def __init__(self, name: str, open_tracker: OpenTracker, on_gone: OnGone) -> None:
        self._name, self._open, self._on_gone = name, open_tracker, on_gone
        self._queue: queue.Queue[StepRecord | None] = queue.Queue(QUEUE_RECORDS)
        self._gone = threading.Lock()
        """Held from the moment on that the tracker is dropped."""
        self._busy_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def tell(self, record: StepRecord) -> None:
        if self._gone.locked():
            return
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > BUSY_S:
            self._drop(f"it has not returned for {BUSY_S:.0f} s")
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._drop(f"it is {QUEUE_RECORDS} records behind")

    def end(self) -> None:
        """Nothing will be told any more."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._drop(f"it is {QUEUE_RECORDS} records behind")

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._drop("it has not come to an end in time")

    def _run(self) -> None:
        try:
            tracker = self._open()
            while True:
                self._busy_since = None
                record = self._queue.get()
                self._busy_since = time.monotonic()
                if self._gone.locked():
                    return
                if record is None:
                    tracker.close()
                    return
                tracker.record(record)
        except BaseException as error:  # a library may call sys.exit: this thread alone is left
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        if self._gone.acquire(blocking=False):
            self._on_gone(self._name, why)
