"""The processes that ``outgrow monitor up`` has started: what is known of them on disk, how they start, and how they end.

A process is known by its pid and when it was started, so that another that got the same pid later is never taken for it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from outgrow.errors import MonitorError
from outgrow.monitoring.recording.recorder import start_ticks
from outgrow.monitoring.stack.installed import PartName

FILE = "processes.json"
LOCK = "lock"
GRACE_S = 10.0
"""Between SIGTERM and SIGKILL."""

_LOCK_PATIENCE_S = 120.0
_POLL_S = 0.05
_LOG_BYTES = 5_000_000
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")
_KEPT_ENDS = ("_PROXY", "_proxy")
_DETACH = '"$@" </dev/null >&2 & echo $!'
"""A shell that ends at once: what it started belongs to nobody but init, and holds no pipe or terminal of ours."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process that we have started. ``restart`` and ``reload`` are digests of what it was configured with."""

    pid: int
    pid_start: float
    started: float
    url: str
    version: str
    restart: str
    reload: str

    @property
    def alive(self) -> bool:
        return is_process(self.pid, self.pid_start)


def is_process(pid: int, pid_start: float) -> bool:
    return start_ticks(pid) == pid_start


# --- what is known of them --------------------------------------------------------------------------------------------


def read_started(folder: Path) -> dict[PartName, Started]:
    """What ``up`` has started, alive or not; empty where nothing can be read."""
    try:
        data = json.loads((folder / FILE).read_text())
        return {name: Started(**one) for name, one in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_started(folder: Path, started: Mapping[PartName, Started]) -> None:
    """Whole or not at all."""
    write_private(folder / FILE, json.dumps({name: asdict(one) for name, one in started.items()}, indent=1))


def write_private(path: Path, text: str) -> None:
    """A file that only its user may read, whole or not at all."""
    make_private(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        aside.unlink()
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
    aside.replace(path)


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for its user alone."""
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time; a second one waits for the first. Raises ``MonitorError`` where that takes too long."""
    make_private(folder)
    with open(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as file:
        until = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise MonitorError(
                        "another outgrow monitor is at work", where=str(folder), hint="try again when it has ended"
                    ) from None
                time.sleep(_POLL_S)
        yield


# --- start ------------------------------------------------------------------------------------------------------------


def log_path(folder: Path, name: PartName) -> Path:
    return folder / name / "log"


def start(command: Sequence[str], log: Path) -> tuple[int, float]:
    """Pid and start of a new process that outlives this one; it writes to ``log``. A NaN start: it has ended already."""
    make_private(log.parent)
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
        done = subprocess.run(
            ["/bin/sh", "-c", _DETACH, "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            cwd=log.parent,
            env=environment(os.environ),
            umask=0o077,
            start_new_session=True,
            check=True,
        )
    pid = int(done.stdout)
    return pid, start_ticks(pid)


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What a server needs of our environment: keys of buckets and tokens stay out, and so does what would set its options."""
    return {name: value for name, value in ours.items() if name in _KEPT or name.startswith("LC_") or name.endswith(_KEPT_ENDS)}


def last_lines(log: Path, since: int, count: int = 8) -> list[str]:
    """The last lines that were written to ``log`` after its byte ``since``."""
    try:
        with open(log, "rb") as file:
            file.seek(max(since, file.seek(0, os.SEEK_END) - 8192))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


# --- end --------------------------------------------------------------------------------------------------------------


def signal_process(pid: int, pid_start: float, number: signal.Signals) -> None:
    """Send a signal to the very process; nothing where it is gone."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            # Opened first and compared then: from here on the handle means this process and no other.
            if not math.isnan(pid_start) and start_ticks(pid) == pid_start:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def end(processes: Iterable[tuple[int, float]], grace_s: float = GRACE_S) -> None:
    """End processes: SIGTERM to all, and SIGKILL to those that are there ``grace_s`` later. They are gone on return."""
    left = [one for one in processes if is_process(*one)]
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        for one in left:
            signal_process(*one, number)
        until = time.monotonic() + patience_s
        while left and time.monotonic() < until:
            time.sleep(_POLL_S)
            left = [one for one in left if is_process(*one)]
