"""sha256 of input files, remembered by path, size and times, so that unchanged inputs are not read again."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from outgrow.errors import DataError
from outgrow.storage import file_digest

_AT_REST_NS = 2_000_000_000
"""A file changed within this time of being read may change again under the same times; its digest is not remembered."""

_SAVE_EVERY_S = 1.0
"""Digests are saved this often, at the least after each file that took longer; each time syncs the disk."""

_TABLE = """create table if not exists measured (
    path text, read_as text, size integer, mtime_ns integer, ctime_ns integer, digest text, text_bytes integer,
    primary key (path, read_as)) strict"""

_SELECT = """select digest, text_bytes from measured
    where path = ? and read_as = ? and size = ? and mtime_ns = ? and ctime_ns = ?"""


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file without reading it; another stamp, perhaps another content."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Measured:
    """sha256 of a file's bytes, and the size of its text after decompression."""

    digest: str
    text_bytes: int


class DigestCache:
    """A small database in ``folder`` (``Site.cache``), safe to share between processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "inputs.sqlite"

    def measure(self, files: Sequence[tuple[Path, Stamp]], text_bytes: Callable[[Path], int], read_as: str) -> list[Measured]:
        """Digest and text size of each file, read only where no entry with its stamp is there.

        ``read_as`` names what ``text_bytes`` takes the file for: the size of its text depends on that. Raises ``DataError``
        where the database is damaged or stays locked.
        """
        try:
            with closing(sqlite3.connect(self._path, timeout=60)) as database:
                return self._measure(database, files, text_bytes, read_as)
        except sqlite3.Error as error:
            raise DataError(
                f"the digests of inputs cannot be kept: {error}",
                where=str(self._path),
                hint="remove the file when no build is running; it only saves reading unchanged inputs again",
            ) from error

    def _measure(
        self, database: sqlite3.Connection, files: Sequence[tuple[Path, Stamp]], text_bytes: Callable[[Path], int], read_as: str
    ) -> list[Measured]:
        """The work of ``measure``; no file is read within a transaction, so that other processes get their turn."""
        with database:
            database.execute(_TABLE)
        measured: list[Measured] = []
        fresh: list[tuple[str | int, ...]] = []
        saved = time.monotonic()
        for path, stamp in files:
            key = str(path.resolve()).encode(errors="surrogateescape").hex()
            row = database.execute(_SELECT, (key, read_as, stamp.size, stamp.mtime_ns, stamp.ctime_ns)).fetchone()
            if row is not None:
                measured.append(Measured(*row))
                continue
            at_rest = max(stamp.mtime_ns, stamp.ctime_ns) < time.time_ns() - _AT_REST_NS
            measured.append(Measured(file_digest(path), text_bytes(path)))
            if at_rest:
                now = measured[-1]
                fresh.append((key, read_as, stamp.size, stamp.mtime_ns, stamp.ctime_ns, now.digest, now.text_bytes))
            if time.monotonic() - saved > _SAVE_EVERY_S:
                _save(database, fresh)
                fresh, saved = [], time.monotonic()
        _save(database, fresh)
        return measured


def _save(database: sqlite3.Connection, entries: Sequence[tuple[str | int, ...]]) -> None:
    if entries:  # no lock is taken for nothing
        with database:
            database.executemany("insert or replace into measured values (?, ?, ?, ?, ?, ?, ?)", entries)
