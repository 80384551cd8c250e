"""A limit on bytes a second, shared by all who read from or write to a place."""

from __future__ import annotations

import threading
import time


class Debt:
    """The pure part: when who takes how much may go on. Bytes are granted at once and paid for by those who come after."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_at = float("-inf")

    def take(self, num_bytes: int, now: float) -> float:
        """Seconds to wait before these bytes may pass."""
        start = max(self._paid_at, now)
        self._paid_at = start + num_bytes / self._bytes_per_s
        return start - now


class RateLimit:
    """At most ``bytes_per_s`` on average over all threads that ``take``; an unused second is not saved up."""

    def __init__(self, bytes_per_s: float) -> None:
        self._debt = Debt(bytes_per_s)
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> None:
        """Returns when ``num_bytes`` more may pass."""
        with self._lock:
            wait_s = self._debt.take(num_bytes, time.monotonic())
        if wait_s > 0:
            time.sleep(wait_s)
