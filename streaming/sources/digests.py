"""sha256 of input files, remembered by path, size and times, so that unchanged inputs are not read again."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from outgrow.storage import file_digest

_AT_REST_NS = 2_000_000_000
"""A file changed within this time of being read may change again under the same times; its digest is not remembered."""

_TABLE = """create table if not exists inputs (
    path text primary key, size integer, mtime_ns integer, ctime_ns integer, digest text, text_bytes integer) strict"""


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

    def measure(self, files: Sequence[tuple[Path, Stamp]], text_bytes: Callable[[Path], int]) -> list[Measured]:
        """Digest and text size of each file, read only where no entry with its stamp is there."""
        with closing(sqlite3.connect(self._path, timeout=60)) as database, database:
            database.execute(_TABLE)
            return [self._one(database, path, stamp, text_bytes) for path, stamp in files]

    def _one(self, database: sqlite3.Connection, path: Path, stamp: Stamp, text_bytes: Callable[[Path], int]) -> Measured:
        key = str(path.resolve()).encode(errors="surrogateescape").hex()
        row = database.execute(
            "select digest, text_bytes from inputs where path = ? and size = ? and mtime_ns = ? and ctime_ns = ?",
            (key, stamp.size, stamp.mtime_ns, stamp.ctime_ns),
        ).fetchone()
        if row is not None:
            return Measured(*row)
        at_rest = max(stamp.mtime_ns, stamp.ctime_ns) < time.time_ns() - _AT_REST_NS
        measured = Measured(file_digest(path), text_bytes(path))
        if at_rest:
            database.execute(
                "insert or replace into inputs values (?, ?, ?, ?, ?, ?)",
                (key, stamp.size, stamp.mtime_ns, stamp.ctime_ns, measured.digest, measured.text_bytes),
            )
        return measured
