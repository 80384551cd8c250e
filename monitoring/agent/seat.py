"""The right to be the agent of a node: a lock that the kernel frees with the process, and ``agent.json`` while it serves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from outgrow.monitoring.agent.start import FILE, LOCK, Running, find_agent

PATIENCE_S = 15.0
"""How long a lock is waited for whose holder serves no more, or not yet."""

_PAUSE_S = 0.1


class Seat:
    """Held from ``take`` on until ``leave``."""

    def __init__(self, node: Path, lock: int) -> None:
        self._node, self._lock = node, lock
        self._seen = self._lock_time()

    @classmethod
    def take(cls, node: Path, patience_s: float = PATIENCE_S) -> Seat | None:
        """None where another agent of the node serves, or ``patience_s`` have passed. Raises ``OSError``."""
        deadline = time.monotonic() + patience_s
        while True:
            node.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(node / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same(lock, node / LOCK):
                    return cls(node, lock)
            os.close(lock)
            if find_agent(node) is not None or time.monotonic() > deadline:
                return None
            time.sleep(_PAUSE_S)

    @property
    def is_lost(self) -> bool:
        """Whether the lock was removed from under us: another agent may be there now, and nobody finds this one."""
        return not _is_same(self._lock, self._node / LOCK)

    def was_asked(self) -> bool:
        """Whether anybody has wanted an agent since this was asked last."""
        before, self._seen = self._seen, self._lock_time()
        return self._seen != before

    def show(self, running: Running) -> None:
        """Tell where the agent is; a full disk is told again with the next call."""
        with contextlib.suppress(OSError):
            if find_agent(self._node) != running:
                aside = self._node / f"{FILE}.new"
                aside.write_text(json.dumps(running.to_dict()))
                aside.replace(self._node / FILE)

    def hide(self) -> None:
        if not self.is_lost:
            (self._node / FILE).unlink(missing_ok=True)

    def leave(self) -> None:
        os.close(self._lock)

    def _lock_time(self) -> int:
        return os.fstat(self._lock).st_mtime_ns


def _is_same(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.lstat())
    except OSError:
        return False
