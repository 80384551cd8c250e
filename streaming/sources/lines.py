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

from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, UNIT_BYTES, BadRecordError

_READ_BYTES = 1024 * 1024
_ZSTD_STEP_BYTES = 1024
"""Compressed bytes that are handed to zstd at once: they make at most 32 MiB (a block of 128 KiB takes 4 bytes)."""
_SHOWN_BYTES = 64 * 1024
"""What is kept of a line that is too long."""

_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class LineBlock:
    """Whole lines: bytes ``start`` to ``start + num_bytes`` of a file's text, the first of them line ``first_line`` (from 1).

    ``data`` holds them where the file is compressed; a plain file's are read where they are needed. A line that is longer than
    a document may be is a block of its own, ``too_long``; of it only the beginning is kept.
    """

    path: Path
    first_line: int
    start: int
    num_bytes: int
    data: bytes | None
    too_long: bool = False

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line numbers and lines, of one too long the beginning; one line at a time is in memory beside what ``data`` holds."""
        with open(self.path, "rb") if self.data is None else io.BytesIO(self.data) as file:
            start = self.start if self.data is None else 0
            file.seek(start)
            if self.too_long:
                yield self.first_line, file.read(_SHOWN_BYTES)
                return
            number = self.first_line
            while file.tell() < start + self.num_bytes:
                yield number, file.readline()
                number += 1


def line_blocks(path: Path) -> Iterator[LineBlock]:
    """The file in blocks of at least ``UNIT_BYTES`` that end at a line's end.

    Raises ``BadRecordError`` after the last whole line that can be read where the compressed stream is damaged.
    """
    keep = _suffix(path) in _COMPRESSED
    line, start = 1, 0
    with _Text(path) as text:
        while head := text.read(UNIT_BYTES):
            end = head.rfind(b"\n") + 1
            last = _Line(head[end:], keep)
            if len(head) == UNIT_BYTES and not head.endswith(b"\n"):
                last.finish(text)
            lost = bool(text.damage) and last.open
            whole = last.num_bytes <= MAX_DOCUMENT_BYTES and not lost
            body = head[:end] + last.kept if whole and keep else head[:end]
            num_bytes = end + last.num_bytes if whole else end
            if num_bytes:
                yield LineBlock(path=path, first_line=line, start=start, num_bytes=num_bytes, data=body if keep else None)
            line, start = line + head.count(b"\n", 0, end), start + num_bytes
            if last.num_bytes > MAX_DOCUMENT_BYTES and not lost:
                beginning = last.kept[:_SHOWN_BYTES] if keep else None
                yield LineBlock(
                    path=path, first_line=line, start=start, num_bytes=last.num_bytes, data=beginning, too_long=True
                )
                start += last.num_bytes
            line += bool(last.num_bytes) and not lost
        if text.damage:
            raise BadRecordError(text.damage, line=line)


def text_bytes(path: Path) -> int:
    """Size of the file's text after decompression. Raises ``BadRecordError`` where the compressed stream is damaged."""
    if _suffix(path) not in _COMPRESSED:
        return path.stat().st_size
    with _Text(path) as text:
        num_bytes = sum(len(chunk) for chunk in iter(lambda: text.read(_READ_BYTES), b""))
        if text.damage:
            raise BadRecordError(f"{text.damage}; none of it is used")
    return num_bytes


class _Line:
    """The last line of a block, perhaps empty; ``kept`` is what is in memory of it."""

    def __init__(self, beginning: bytes, keep: bool) -> None:
        self._parts = [beginning]
        self._keep = keep
        self.num_bytes = len(beginning)
        self.open = bool(beginning)

    @property
    def kept(self) -> bytes:
        return b"".join(self._parts)

    def finish(self, text: _Text) -> None:
        """Read on to the end of the line; of one too long no more is kept than a document may have."""
        while self.open and (chunk := text.read_line(_READ_BYTES)):
            self.num_bytes += len(chunk)
            self.open = not chunk.endswith(b"\n")
            if self._keep and self.num_bytes <= MAX_DOCUMENT_BYTES:
                self._parts.append(chunk)
            elif self._keep:
                self._parts = [self.kept[:_SHOWN_BYTES]]


class _Text:
    """The decompressed bytes of a file. Where the compressed stream is damaged it ends, and ``damage`` says why."""

    def __init__(self, path: Path) -> None:
        self._file = cast(io.BufferedReader, _open(path))  # whatever it is, it has read1
        self.damage = ""

    def __enter__(self) -> _Text:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end."""
        parts: list[bytes] = []
        while size and (part := self._next(size, whole_line=False)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def read_line(self, size: int) -> bytes:
        """The rest of the line, at most ``size`` bytes of it; nothing at the end, or where damage comes before the line's."""
        return self._next(size, whole_line=True)

    def _next(self, size: int, *, whole_line: bool) -> bytes:
        if self.damage:
            return b""
        try:
            return self._file.readline(size) if whole_line else self._file.read1(size)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            if "too much memory" in str(error):  # what zstd says of a window above its limit of 128 MiB
                self.damage = (
                    "the zstd file needs a window of more than 128 MiB to be decompressed; "
                    "compress it again without --long, or with --long=27 at most"
                )
            else:
                self.damage = f"the compressed file is damaged: {error}"
            return b""


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _open(path: Path) -> BinaryIO:
    if _suffix(path) == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if _suffix(path) == ".zst":
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
