"""A value that is read in a thread of its own, so that a disk, driver or bucket that hangs never holds up an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """``at`` is in seconds of the monotonic clock."""

    value: T
    at: float

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.at


class Background(Generic[T]):
    """Reads when asked, at most every ``every_s`` seconds, and one at a time: a read that hangs costs one thread."""

    def __init__(self, read: Callable[[], T], *, name: str, every_s: float = 0.0) -> None:
        self._read, self._name, self._every_s = read, name, every_s
        self._lock = threading.Lock()
        self._under_way: threading.Event | None = None
        self._begun: float | None = None
        self._latest: Reading[T] | None = None
        self._error: Exception | None = None

    def get(self, wait_s: float) -> Reading[T] | None:
        """The newest value, after waiting at most ``wait_s`` for one that is being read; None before the first.

        Raises what the read raised, once.
        """
        with self._lock:
            due = self._begun is None or time.monotonic() - self._begun >= self._every_s
            if self._under_way is None and due:
                self._under_way, self._begun = threading.Event(), time.monotonic()
                threading.Thread(target=self._run, args=(self._under_way,), name=self._name, daemon=True).start()
            under_way = self._under_way
        if under_way is not None:
            under_way.wait(wait_s)
        with self._lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            return self._latest

    @property
    def latest(self) -> Reading[T] | None:
        """The newest value, without asking for another."""
        with self._lock:
            return self._latest

    def _run(self, done: threading.Event) -> None:
        error: Exception | None = None
        latest = self._latest
        try:
            latest = Reading(self._read(), time.monotonic())
        except Exception as raised:  # it is told to whoever asks
            error = raised
        with self._lock:
            self._latest, self._error, self._under_way = latest, error, None
        done.set()
