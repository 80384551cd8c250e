"""Where the processes of a run meet the one prefetcher of their node: a private folder with a socket and a lock.

Whoever holds the lock is the prefetcher, or is about to start it: the lock is taken by the process that starts it and lives on
in the process that is started, so the kernel frees it at the very moment when that one ends, however it ends. Names of sockets
are short by law (107 bytes), folders of users are not: both sides reach the socket through a descriptor of its folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import RunRef
from outgrow.errors import DataError
from outgrow.processes import start_python
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.slot import tier_folder

_GATES = "shards/.gates"
_LOCK = "lock"
_SOCKET = "sock"
_BACKLOG = 1024
_START = "from outgrow.streaming.tiers.prefetcher import serve; serve({folder!r}, {lock}, {listener}, {assignment})"


def gate_folder(hot: Place, run: RunRef) -> Path:
    """The folder in which the processes of a run on this node find their prefetcher, below the first tier's, which is made.

    Raises ``SiteError`` where that cannot be."""
    return tier_folder(hot) / _GATES / f"{run.name}-{run.fingerprint[:8]}-{socket.gethostname()}"


@dataclass(frozen=True)
class Seat:
    """The right to be the prefetcher of ``folder``: its lock, held, and its socket, listening."""

    folder: Path
    lock: int
    listener: socket.socket

    def clear(self) -> None:
        """Remove the folder, while the lock still keeps others from it; whoever waits for the lock makes a new one."""
        for name in (_SOCKET, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def take_seat(folder: Path) -> Seat | None:
    """The seat, where nobody has it; what a killed prefetcher left is cleared away.

    Raises ``DataError`` where the folder is not this user's own."""
    lock = _lock(folder)
    if lock is None:
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        (folder / _SOCKET).unlink(missing_ok=True)
        with _short_name(folder) as name:
            listener.bind(name)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        os.close(lock)
        raise
    return Seat(folder, lock, listener)


def start_prefetcher(seat: Seat, assignment: bytes) -> None:
    """Start the prefetcher and hand it the seat. ``assignment`` holds secrets: it goes through a pipe, and nowhere else."""
    theirs, ours = os.pipe()
    fds = {"lock": seat.lock, "listener": seat.listener.fileno(), "assignment": theirs}
    code = _START.format(folder=str(seat.folder), **fds)
    with contextlib.suppress(BrokenPipeError), open(ours, "wb") as pipe:  # if it died, whoever connects will see it
        try:
            # A session of its own: Ctrl-C and the end of a terminal are the ranks' affair, and it ends with the last of them.
            process = start_python(code, pass_fds=tuple(fds.values()), start_new_session=True, stdout=subprocess.DEVNULL)
        finally:
            os.close(theirs)
            os.close(seat.lock)
            seat.listener.close()
        # It outlives whoever asked for it, and is reaped as soon as it has ended, whatever this process does then.
        threading.Thread(target=process.wait, name="outgrow-reap", daemon=True).start()
        pipe.write(assignment)


def connect(folder: Path) -> socket.socket | None:
    """A connection to the prefetcher of ``folder``; None where nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_name(folder) as name:
            connection.connect(name)
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
        connection.close()
        return None
    return connection


def _lock(folder: Path) -> int | None:
    """The lock of the folder, held; None where another holds it."""
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            _check_owner(folder)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # cleared just now by the one who held it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if _is_same(lock, folder / _LOCK):
            return lock
        os.close(lock)  # of a folder that was cleared between the two


def _check_owner(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise DataError(
            "the folder in which the processes of a run meet must be this user's own, with mode 0700",
            where=str(folder),
            hint="remove it, or give the first of tiers: in site.yaml a folder that nobody else writes to",
        )


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _short_name(folder: Path) -> Iterator[str]:
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_SOCKET}"
    finally:
        os.close(fd)
