"""Who holds a slot: a lock that dies with its holder, a record of who that is, and the lock of a whole tier.

Machines that share a disk may not see each other's locks (NFS without a lock manager). So a holder also touches its lease every
few seconds, and a slot last held under another boot of a kernel counts as held until that has stopped for a minute.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from outgrow.errors import SiteError

LEASE, RECORD = "LEASE", "lease.json"
"""Files of a slot: what its holder locks, and who that is."""
QUIET_S = 60.0
"""So long after its last sign a holder on another machine counts as dead."""

_TOUCH_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a slot for which run, or held it last, and how much room that was promised.

    ``boot`` tells one boot of a kernel from another; empty once the slot was given back.
    """

    run: str = ""
    pid: int = 0
    host: str = ""
    boot: str = ""
    room_bytes: int = 0

    @classmethod
    def here(cls, run: str, room_bytes: int) -> Self:
        """This process."""
        return cls(run=run, pid=os.getpid(), host=socket.gethostname(), boot=_boot(), room_bytes=room_bytes)

    @classmethod
    def read(cls, slot: Path) -> Self:
        """An empty one where the first holder died before it wrote a record."""
        try:
            return cls(**json.loads((slot / RECORD).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def write(self, slot: Path) -> None:
        aside = slot / f"{RECORD}.new"
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(slot / RECORD)


@dataclass(kw_only=True)
class Lease:
    """A slot held by this process until ``close``."""

    slot: Path
    _file: int
    _closed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def take(cls, slot: Path) -> Self:
        """Raises ``BlockingIOError`` where another process holds it."""
        file = os.open(slot / LEASE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(file)
        except BaseException:
            os.close(file)
            raise
        lease = cls(slot=slot, _file=file)
        threading.Thread(target=lease._touch, name="lease", daemon=True).start()
        return lease

    def close(self) -> None:
        """Give the slot back; a second time does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(OSError):  # a disk that is gone or full takes no note; the lock is freed all the same
            holder = Holder.read(self.slot)
            if holder.pid:
                replace(holder, pid=0, boot="").write(self.slot)
        os.close(self._file)

    def _touch(self) -> None:
        while not self._closed.wait(_TOUCH_S):
            with suppress(OSError):
                os.utime(self.slot / LEASE)


def is_held(slot: Path, now: float) -> bool:
    """Whether a living process holds the slot, here or on another machine that sees the disk; ``now`` is what ``tier_lock``
    gave."""
    if Holder.read(slot).boot not in ("", _boot()) and now - last_used(slot) < QUIET_S:
        return True
    file = os.open(slot / LEASE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def last_used(slot: Path) -> float:
    """When the slot's holder last gave a sign, s of Unix time by the clock of the disk."""
    return (slot / LEASE).lstat().st_mtime


@contextmanager
def tier_lock(folder: Path) -> Iterator[float]:
    """Holds the lock of the slots in ``folder``; gives the time by the clock of their disk, s of Unix time.

    Raises ``SiteError`` where the disk cannot lock files, or another user's slots lie there.
    """
    try:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SiteError(
            f"slots cannot be taken or looked at here: {error.strerror}",
            where=str(folder),
            hint="each user needs a folder of their own for a tier, on a disk that can be written",
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise SiteError("this disk cannot lock files", where=str(folder), hint="make a local disk the first tier") from None
        os.utime(lock)
        yield os.fstat(lock).st_mtime
    finally:
        os.close(lock)


def _boot() -> str:
    """What tells this boot of the kernel from any other, in a container too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
