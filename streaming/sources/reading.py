"""The one engine under all kinds that read files: it lists them, cuts them into work units, reads, and acts on ``on_error``.

A kind brings a ``FileReader`` for whole files, or cuts a file into pieces of its own (blocks of lines, groups of rows). Neither
knows of work units, digests, links that lead nowhere, or what the recipe says of records that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from outgrow.errors import DataError
from outgrow.recipes.schema.sources import FileSource, OnError
from outgrow.streaming.sources.digests import DigestCache, Stamp
from outgrow.streaming.sources.document import (
    MAX_DOCUMENT_BYTES,
    UNIT_BYTES,
    BadRecordError,
    Document,
    Dropped,
    DropReason,
    Input,
    Unit,
)
from outgrow.streaming.sources.documents import units_of
from outgrow.streaming.sources.files import InputFile, find_files

QUARANTINE_BYTES = 64 * 1024
"""At most this much of what a record holds is kept when it is quarantined."""

_EXCLUDE = "exclude the file, or set on_error: skip or quarantine"
_HINTS: dict[DropReason, str] = {
    "undecodable": f"set the source's encoding where it has one, {_EXCLUDE}",
    "malformed": f"correct it, {_EXCLUDE}",
    "missing": f"mend it, {_EXCLUDE}",
    "unrenderable": f"correct it, {_EXCLUDE}",
}


# --- readers ----------------------------------------------------------------------------------------------------------


class FileReader(Protocol):
    """How whole files of one kind are read: a frozen dataclass of plain values, so that it can be sent to another process."""

    def read(self, path: Path, name: str) -> Iterator[Document | BadRecordError]:
        """The documents of one file; ``Document.source`` is ``name``, or ``name#number`` where there are several.

        Yields a ``BadRecordError`` for a record that does not fit, and goes on; raises it where the file cannot be read on.
        A document without text may be yielded: it is counted as empty.
        """


class Piece(Protocol):
    """A file, or a part of one, that is read by itself; plain data, so that it can be sent to another process."""

    @property
    def name(self) -> str:
        """Name of the file within the source."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def num_bytes(self) -> int:
        """Size of its text, for progress."""

    def read(self) -> Iterator[Document | BadRecordError]:
        """As ``FileReader.read``."""


@dataclass(frozen=True, kw_only=True)
class WholeFile:
    """A file that is read in one go."""

    name: str
    path: Path
    num_bytes: int
    reader: FileReader

    def read(self) -> Iterator[Document | BadRecordError]:
        return self.reader.read(self.path, self.name)


@dataclass(frozen=True, kw_only=True)
class BadPiece:
    """What was found unfit while the file was being cut."""

    name: str
    path: Path
    num_bytes: int
    error: BadRecordError

    def read(self) -> Iterator[Document | BadRecordError]:
        yield self.error


# --- work units -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FilesUnit:
    """Some pieces, each read in turn."""

    pieces: tuple[Piece, ...]
    on_error: OnError

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    def documents(self) -> Iterator[Document | Dropped]:
        for piece in self.pieces:
            for item in _read(piece):
                bad = item if isinstance(item, BadRecordError) else unfit(item)
                yield item if bad is None else _leave_out(bad, piece.name, piece.path, self.on_error)  # type: ignore[misc]


def units_of_pieces(pieces: Iterable[Piece], on_error: OnError) -> Iterator[FilesUnit]:
    """The pieces in order, in units of at least ``UNIT_BYTES``."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        batch.append(piece)
        num_bytes += piece.num_bytes
        if num_bytes >= UNIT_BYTES:
            yield FilesUnit(pieces=tuple(batch), on_error=on_error)
            batch, num_bytes = [], 0
    if batch:
        yield FilesUnit(pieces=tuple(batch), on_error=on_error)


def _read(piece: Piece) -> Iterator[Document | BadRecordError]:
    """What the piece yields, and as the last item what it raises."""
    try:
        yield from piece.read()
    except BadRecordError as bad:
        yield bad
    except RecursionError:
        yield BadRecordError("it is nested too deeply")
    except OSError as error:  # the machine's fault and not the file's: never a reason to leave it out
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=str(piece.path)) from error


def unfit(document: Document) -> BadRecordError | None:
    """Why a document that was read is not used, None where it is."""
    content = document.content
    if isinstance(content, str):
        if not content or content.isspace():
            return BadRecordError("it has no text", reason="empty", source=document.source)
        if len(content) > MAX_DOCUMENT_BYTES:
            message = f"{len(content):,} characters are too long for one document; at most {MAX_DOCUMENT_BYTES:,}"
            return BadRecordError(message, source=document.source, content=content[:QUARANTINE_BYTES])
    elif isinstance(content, np.ndarray) and not len(content):
        return BadRecordError("it has no token ids", reason="empty", source=document.source)
    return None


# --- on_error ---------------------------------------------------------------------------------------------------------


def _leave_out(bad: BadRecordError, name: str, path: Path, on_error: OnError) -> Dropped:
    """The place where ``on_error`` acts: the record as it is counted and listed, or ``DataError`` where the build is to stop.

    What is merely empty never stops a build.
    """
    source = bad.source or (f"{name}#{bad.line}" if bad.line else name)
    if bad.reason == "empty":
        return Dropped(source=source, reason="empty", detail=str(bad))
    if on_error == "stop":
        raise DataError(str(bad), where=f"{path}:{bad.line}" if bad.line else str(path), hint=_HINTS[bad.reason])
    content = ""
    if on_error == "quarantine":
        content = _beginning(path) if source == name and not bad.content else _clipped(bad.content)
    return Dropped(source=source, reason=bad.reason, detail=str(bad), content=content)


def _clipped(text: str) -> str:
    """At most ``QUARANTINE_BYTES`` of a text, and what is no text in it replaced."""
    data = text[:QUARANTINE_BYTES].encode(errors="replace")
    return data[:QUARANTINE_BYTES].decode(errors="ignore")


def _beginning(path: Path) -> str:
    """What a file begins with, as text; nothing of a file that is no text."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        data = file.read(QUARANTINE_BYTES)
    return "" if b"\0" in data else _clipped(data.decode(errors="replace"))


# --- the opened source ------------------------------------------------------------------------------------------------


class Files:
    """An opened source of files; ``make_units`` gives its work units anew at each call, ``read_as`` names ``text_bytes``."""

    def __init__(
        self,
        files: tuple[InputFile, ...],
        digests: DigestCache,
        *,
        make_units: Callable[[], Iterator[Unit]],
        text_bytes: Callable[[Path], int],
        read_as: str,
    ) -> None:
        self._files = files
        self._digests = digests
        self._make_units = make_units
        self._text_bytes = text_bytes
        self._read_as = read_as

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Each file with its digest; files that are unchanged since an earlier call are not read again."""
        measured = self._digests.measure([(file.path, file.stamp) for file in self._files], self._text_bytes, self._read_as)
        return tuple(
            Input(name=file.name, digest=m.digest, num_bytes=file.stamp.size, text_bytes=m.text_bytes)
            for file, m in zip(self._files, measured, strict=True)
        )

    def units(self) -> Iterator[Unit]:
        """Its work units in order."""
        return self._make_units()

    def check_unchanged(self) -> None:
        """Raises ``DataError`` naming the first file that was changed or removed since it was listed."""
        for file in self._files:
            if not file.path.exists() or Stamp.of(file.path) != file.stamp:
                raise DataError(
                    "the file changed while the dataset was being built",
                    where=str(file.path),
                    hint="build again when it is at rest",
                )


def stored_bytes(path: Path) -> int:
    """Size of a file as it lies on the disk."""
    return path.stat().st_size


def open_files(
    stream: str,
    source: FileSource,
    root: str,
    digests: DigestCache,
    *,
    cut: Callable[[InputFile], Iterator[Piece]],
    check: Callable[[InputFile], BadRecordError | None] = lambda _: None,
    text_bytes: Callable[[Path], int] = stored_bytes,
) -> Files:
    """The source at ``root``: its files cut into pieces by ``cut``.

    ``check`` tells now, without reading the whole, why a file is unfit; ``text_bytes`` may raise ``BadRecordError`` likewise.
    Raises ``DataError`` where no file matches, and for what does not fit where the recipe says ``on_error: stop``.
    """
    found = find_files(stream, root, source.include, source.exclude)
    if not found.files and source.on_error != "stop":
        raise DataError(f"stream '{stream}': all that matches are links that lead nowhere", where=root)
    dropped = [
        _leave_out(BadRecordError("the link leads to no file that can be read", reason="missing"), name, path, source.on_error)
        for name, path in found.dangling
    ]
    unfit_files = {file.name: bad for file in found.files if (bad := check(file))}
    for file in found.files:
        if file.name in unfit_files:  # a build that is to stop stops now; else the unit that comes to it counts it
            _leave_out(unfit_files[file.name], file.name, file.path, source.on_error)

    def measure(path: Path) -> int:
        try:
            return text_bytes(path)
        except BadRecordError as bad:
            _leave_out(bad, path.name, path, source.on_error)
            return stored_bytes(path)

    def pieces() -> Iterator[Piece]:
        for file in found.files:
            if file.name in unfit_files:
                yield BadPiece(name=file.name, path=file.path, num_bytes=measure(file.path), error=unfit_files[file.name])
            else:
                yield from cut(file)

    def make_units() -> Iterator[Unit]:
        yield from units_of(dropped)
        yield from units_of_pieces(pieces(), source.on_error)

    return Files(found.files, digests, make_units=make_units, text_bytes=measure, read_as=text_bytes.__module__)


def open_whole_files(
    stream: str, source: FileSource, root: str, digests: DigestCache, reader: FileReader, *, max_bytes: int | None
) -> Files:
    """The source at ``root``, its files read whole by ``reader``; one of more than ``max_bytes`` is unfit (None: no limit)."""

    def cut(file: InputFile) -> Iterator[WholeFile]:
        yield WholeFile(name=file.name, path=file.path, num_bytes=file.stamp.size, reader=reader)

    def check(file: InputFile) -> BadRecordError | None:
        if max_bytes is None or file.stamp.size <= max_bytes:
            return None
        return BadRecordError(f"{file.stamp.size:,} bytes are too long for one document; at most {max_bytes:,}: divide it")

    return open_files(stream, source, root, digests, cut=cut, check=check)
