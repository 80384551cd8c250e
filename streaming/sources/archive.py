"""Members of a zip file (EPUB, DOCX, .fb2.zip), read within bounds whatever its headers say.

Nothing is written to disk, and what is decompressed is counted as it comes.
"""

from __future__ import annotations

import errno
import io
import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, BadRecordError

MAX_MEMBERS = 20_000
"""Files in one archive, at most."""

_DIRECTORY_BYTES = 4 * 1024 * 1024
"""Longest table of contents: zipfile reads it in one piece and makes an object of each entry."""
_READ_BYTES = 1024 * 1024
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, OverflowError)
"""What zipfile raises for bytes that are no sound zip file."""


class Archive:
    """A zip file that is open for reading; use it with ``with``.

    Raises ``BadRecordError`` for what is truncated, encrypted or compressed in an unusual way, and where all that is read of it
    has more than ``MAX_DOCUMENT_BYTES``.
    """

    def __init__(self, path: Path) -> None:
        self._left = MAX_DOCUMENT_BYTES
        self._file = _Pieces(path)
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (*_DAMAGE, OSError) as error:
            self._file.close()
            raise _damaged(error) from None
        except BadRecordError:
            self._file.close()
            raise
        self._members = {member.filename: member for member in self._zip.infolist() if not member.is_dir()}
        if len(self._members) > MAX_MEMBERS:
            self.close()
            raise BadRecordError(f"it holds {len(self._members):,} files; at most {MAX_MEMBERS:,}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its files, in the order of its table of contents."""
        return tuple(self._members)

    def read(self, name: str) -> bytes:
        """What the file of that name holds; its checksum is right."""
        if name not in self._members:
            raise BadRecordError(f"it holds no file {name}")
        member = self._members[name]
        if member.flag_bits & _ENCRYPTED:
            raise BadRecordError(f"{name} in it is encrypted")
        if member.compress_type not in _METHODS:
            raise BadRecordError(
                f"{name} in it is compressed by method {member.compress_type}; allowed: 0 (stored), 8 (deflate)"
            )
        parts: list[bytes] = []
        try:
            with self._zip.open(member) as file:
                while part := file.read(_READ_BYTES):
                    self._left -= len(part)
                    if self._left < 0:
                        raise BadRecordError(f"it decompresses to more than {MAX_DOCUMENT_BYTES:,} bytes")
                    parts.append(part)
        except BadRecordError:
            raise
        except (*_DAMAGE, OSError) as error:
            raise _damaged(error, name) from None
        return b"".join(parts)

    def close(self) -> None:
        self._zip.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def is_zip(path: Path) -> bool:
    """Whether the file begins as zip files do."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


class _Pieces(io.FileIO):
    """A file that is only read in pieces of bounded size."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._size - self.tell(), 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _DIRECTORY_BYTES:
            raise BadRecordError(f"its table of contents has {wanted:,} bytes; at most {_DIRECTORY_BYTES:,}")
        return super().read(wanted) or b""


def _damaged(error: Exception, name: str = "") -> BadRecordError:
    """What a zip file that cannot be read is called. Raises errors of the machine itself again."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a header sent us to before the file's beginning
        raise error
    reason = str(error) or type(error).__name__
    return BadRecordError(f"the zip file is damaged, or is none: {f'{name}: ' if name else ''}{reason}")
