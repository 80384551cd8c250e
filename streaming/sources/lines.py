"""Lines of plain, gzip and zstd files in blocks of bounded memory, whatever the file decompresses to."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from outgrow.errors import DataError
from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, UNIT_BYTES

_READ_BYTES = 1024 * 1024
_ZSTD_STEP_BYTES = 1024
"""Compressed bytes that are handed to zstd at once: they make at most 32 MiB (a block of 128 KiB takes 4 bytes)."""

COMPRESSED_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class LineBlock:
    """Whole lines: bytes ``start`` to ``start + num_bytes`` of a file's text, the first of them line ``first_line`` (from 1).

    ``data`` holds them where the file is compressed; a plain file's are read where they are needed.
    """

    path: Path
    first_line: int
    start: int
    num_bytes: int
    data: bytes | None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line numbers and lines; one line at a time is in memory beside what ``data`` holds."""
        stop = self.start + self.num_bytes if self.data is None else self.num_bytes
        with open(self.path, "rb") if self.data is None else io.BytesIO(self.data) as file:
            file.seek(self.start if self.data is None else 0)
            number = self.first_line
            while file.tell() < stop:
                yield number, file.readline()
                number += 1


def line_blocks(path: Path) -> Iterator[LineBlock]:
    """The file in blocks of at least ``UNIT_BYTES`` that end at a line's end.

    Raises ``DataError`` naming file and line where one is longer than a document may be, or the compressed stream is damaged.
    """
    keep = path.suffix in COMPRESSED_SUFFIXES
    first_line, start = 1, 0
    with _open(path) as file:
        while block := _block(path, file, first_line, start, keep):
            yield block[0]
            first_line, start = first_line + block[1], start + block[0].num_bytes


def text_bytes(path: Path) -> int:
    """Size of the file's text after decompression. Raises ``DataError`` where the compressed stream is damaged."""
    if path.suffix not in COMPRESSED_SUFFIXES:
        return path.stat().st_size
    with _open(path) as file:
        return sum(len(chunk) for chunk in _chunks(path, file))


def _block(path: Path, file: BinaryIO, first_line: int, start: int, keep: bool) -> tuple[LineBlock, int] | None:
    """The next block and its number of lines; None at the end of the file."""
    parts: list[bytes] = []
    num_bytes = lines = 0
    line_bytes = 0
    while num_bytes < UNIT_BYTES or line_bytes:
        chunk = _read(path, file, whole_line=num_bytes >= UNIT_BYTES)
        if not chunk:
            break
        num_bytes += len(chunk)
        lines += chunk.count(b"\n")
        end = chunk.rfind(b"\n")
        line_bytes = line_bytes + len(chunk) if end < 0 else len(chunk) - end - 1
        if line_bytes > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"the line is longer than {MAX_DOCUMENT_BYTES:,} bytes",
                where=f"{path}:{first_line + lines}",
                hint="divide the document",
            )
        if keep:
            parts.append(chunk)
    if not num_bytes:
        return None
    data = b"".join(parts) if keep else None
    return LineBlock(path=path, first_line=first_line, start=start, num_bytes=num_bytes, data=data), lines


def _chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    while chunk := _read(path, file, whole_line=False):
        yield chunk


def _read(path: Path, file: BinaryIO, *, whole_line: bool) -> bytes:
    try:
        return file.readline(_READ_BYTES) if whole_line else file.read(_READ_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        if "too much memory" in str(error):  # what zstd says of a window above its limit of 128 MiB
            raise DataError(
                "the zstd file needs a window of more than 128 MiB to be decompressed",
                where=str(path),
                hint="compress it again without --long, or with --long=27 at most",
            ) from None
        raise DataError(f"the compressed file is damaged: {error}", where=str(path)) from None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path), _READ_BYTES))
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A zstd file of one or more frames, decompressed as it is read; one that ends within a frame raises ``EOFError``."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  (closed by close)
        self._context = zstandard.ZstdDecompressor()
        self._frame = self._context.decompressobj()
        self._begun = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._output:
            if not self._fill():
                return 0
        size = min(len(view), len(self._output))
        view[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _fill(self) -> bool:
        """Decompress a little more into ``_output``, perhaps nothing; False at the end of the file."""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = self._context.decompressobj()
            self._begun = False
        step = self._input or self._file.read(_ZSTD_STEP_BYTES)
        self._input = b""
        if not step:
            if self._begun:
                raise EOFError("it ends within a zstd frame")
            return False
        self._begun = True
        self._output = memoryview(self._frame.decompress(step))
        return True
