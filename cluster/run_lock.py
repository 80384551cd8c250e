"""One live writer a run folder: a lock that says who holds it, and that is taken over when its owner is dead.

A lock is the newest file of ``<run folder>/lock/``: ``00000001.json``, ``00000002.json`` and so on. Whoever finds the newest
released or stale creates the next number, which one process alone can; so of any number that race for a dead owner's lock, one
wins, on a bucket with conditional put as on a disk. Numbers only grow: a released lock stays until the next one is there. The
owner renews its file; a reader on the same machine asks for the owner's process, any other for the age of the renewal.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import psutil

from outgrow.contracts import Record
from outgrow.errors import RunError
from outgrow.retry import Unreachable
from outgrow.storage import Storage

FOLDER = "lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Age of the last renewal above which an owner on another machine counts as dead."""

_START_TOLERANCE_S = 2.0
_WRITING_S = 1.0
"""A lock that cannot be parsed may be being written; after this time its writer was killed half-way."""


@dataclass(frozen=True, kw_only=True)
class Owner(Record):
    """Who holds a lock. ``machine`` tells apart hosts, boots and containers; times are Unix seconds."""

    token: str
    pid: int
    host: str
    machine: str
    started: float
    heartbeat: float
    released: bool = False

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def holder(storage: Storage, run_folder: str) -> Owner | None:
    """The live owner of a run folder; None where nobody is."""
    owner = _newest(storage, run_folder)[1]
    return owner if owner is not None and is_live(owner, time.time()) else None


@contextlib.contextmanager
def hold(storage: Storage, run_folder: str) -> Iterator[Owner | None]:
    """The lock of a run folder, renewed until the ``with`` ends; gives the dead owner it was taken from, if there was one.

    Raises ``RunError`` with pid and host of the owner where that is live. Should another process take the lock over, since this
    one could not renew it in time, the main thread is interrupted as by Ctrl-C and the ``with`` ends in ``RunError``.
    """
    number, before = _newest(storage, run_folder)
    if before is not None and is_live(before, time.time()):
        raise _in_use(run_folder, before)
    mine = _myself()
    key = _key(run_folder, number + 1)
    created = storage.create(key, _to_bytes(mine))
    newest, owner = _newest(storage, run_folder)
    if owner is None or owner.token != mine.token:
        if created:  # an older number than the newest, free again because it had been cleared away
            storage.remove(key)
        raise _in_use(run_folder, owner)
    for old in _numbers(storage, run_folder):
        if old < newest:
            storage.remove(_key(run_folder, old))
    heart = _Heart(storage, run_folder, newest, mine)
    try:
        yield before if before is not None and not before.released else None
    finally:
        heart.stop()
        if heart.lost:
            raise RunError(f"the run was taken over by {heart.lost}, for this process did not renew its lock", where=run_folder)
        # A full disk, a bucket that is away: the lock ends with this process instead.
        with contextlib.suppress(OSError, Unreachable):
            storage.write(key, _to_bytes(replace(mine, released=True)))


def is_live(owner: Owner, now: float) -> bool:
    """Whether ``owner`` may still write: its process exists, or, where that cannot be asked, it renewed its lock lately."""
    if owner.released:
        return False
    if owner.machine != this_machine():
        return now - owner.heartbeat <= STALE_S
    try:
        process = psutil.Process(owner.pid)
        same = abs(process.create_time() - owner.started) <= _START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@functools.cache
def this_machine() -> str:
    """Host name, boot and pid namespace: where these are equal, a pid means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    parts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else str(int(psutil.boot_time()))]
    return " ".join([*parts, os.readlink(namespace)] if namespace.exists() else parts)


class _Heart:
    """Renews a lock from a thread of its own."""

    def __init__(self, storage: Storage, run_folder: str, number: int, owner: Owner) -> None:
        self._storage, self._run_folder, self._number, self._owner = storage, run_folder, number, owner
        self.lost: Owner | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            # A full disk or a lost network must not stop the run; another machine may take over after STALE_S.
            with contextlib.suppress(Exception):
                newest, owner = _newest(self._storage, self._run_folder)
                if newest > self._number:
                    self.lost = owner
                    # A real signal, to the main thread: it ends a wait there at once.
                    signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGINT)
                    return
                renewed = replace(self._owner, heartbeat=time.time())
                self._storage.write(_key(self._run_folder, self._number), _to_bytes(renewed))


def _myself() -> Owner:
    return Owner(
        token=secrets.token_hex(8),
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=this_machine(),
        started=psutil.Process().create_time(),
        heartbeat=time.time(),
    )


def _newest(storage: Storage, run_folder: str) -> tuple[int, Owner | None]:
    """The highest number and its owner; 0 and None before the first, None too for a file whose writer was killed half-way."""
    deadline = time.monotonic() + _WRITING_S
    while True:
        number = max(_numbers(storage, run_folder), default=0)
        if not number:
            return 0, None
        try:
            return number, Owner.from_dict(storage.read_json(_key(run_folder, number)))
        except (ValueError, FileNotFoundError):
            if time.monotonic() > deadline:
                return number, None
            time.sleep(0.02)


def _numbers(storage: Storage, run_folder: str) -> list[int]:
    names = storage.names(f"{run_folder}/{FOLDER}")
    return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()]


def _key(run_folder: str, number: int) -> str:
    return f"{run_folder}/{FOLDER}/{number:08d}.json"


def _to_bytes(owner: Owner) -> bytes:
    return json.dumps(owner.to_dict(), indent=1).encode() + b"\n"


def _in_use(run_folder: str, owner: Owner | None) -> RunError:
    who = "a process that is just taking it" if owner is None else str(owner)
    seen = ""
    if owner is not None and owner.machine != this_machine():
        seen = f", seen {time.time() - owner.heartbeat:.0f} s ago; if it is dead, the run is free {STALE_S:.0f} s after that"
    return RunError(
        f"the run is in use by {who}{seen}",
        where=run_folder,
        hint="wait for it, end it, or start another run with --fresh or run.name=...",
    )
