"""Source ``json``: files that hold a list of records, an object with such a list in it, or one record.

The file is looked through once for where its records lie, without decoding them, so that one of gigabytes takes little memory
and is divided among processes. A record with a mistake costs that record alone, as long as its brackets tell where it ends.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from outgrow.recipes.schema.sources import JsonSource, Shape
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, UNIT_BYTES, BadRecordError, Document
from outgrow.streaming.sources.files import InputFile
from outgrow.streaming.sources.json_records import read_record, too_long
from outgrow.streaming.sources.json_text import parse
from outgrow.streaming.sources.reading import QUARANTINE_BYTES, BadPiece, Files, Piece, open_files

_READ_BYTES = 1024 * 1024
_MAX_KEY_BYTES = 1024 * 1024
_MAX_DEPTH = 1000
"""Brackets within each other that are followed to find the end of a record; what may be in one is less (``json_text``)."""
_NAMED_KEYS = 10
_SPACE = re.compile(rb"[ \t\n\r]*+")
_SCALAR = re.compile(rb'[^ \t\n\r,:"\[\]{}]*+')
_INSIDE_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', flags=re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', flags=re.DOTALL)
_NO_BRACKET = rb'[^"\[\]{}]*+(?:' + _STRING.pattern + rb'[^"\[\]{}]*+)*+'


def _over_values(depth: int) -> bytes:
    """A pattern of all up to the next bracket, over lists and objects that end and nest at most ``depth`` deep."""
    if not depth:
        return _NO_BRACKET
    return _NO_BRACKET + rb"(?:[\[{]" + _over_values(depth - 1) + rb"[\]}]" + _NO_BRACKET + rb")*+"


_TO_BRACKET = re.compile(_over_values(4), flags=re.DOTALL)
"""Goes by most values in one step of the pattern; the rest is followed bracket by bracket."""
_KINDS = {b"{": "an object", b"[": "a list", b'"': "a text", b"": "empty"}


@dataclass(frozen=True, kw_only=True)
class RecordSpan:
    """Where a record lies in its file: from byte ``start``, in ``line``. ``number`` counts from 1; 0 is the only one."""

    number: int
    line: int
    start: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class RecordsPiece:
    """Some records of the file ``name``; ``num_bytes`` counts what lies between them too."""

    name: str
    path: Path
    num_bytes: int
    spans: tuple[RecordSpan, ...]
    shape: Shape

    def read(self) -> Iterator[Document | BadRecordError]:
        with open(self.path, "rb") as file:
            for span in self.spans:
                source = f"{self.name}#{span.number}" if span.number else self.name
                file.seek(span.start)
                if span.num_bytes > MAX_DOCUMENT_BYTES:
                    yield too_long(span.num_bytes, file.read(QUARANTINE_BYTES), source, span.line)
                else:
                    yield read_record(file.read(span.num_bytes), self.shape, source, span.line)


def open_json(stream: str, source: JsonSource, root: str, digests: DigestCache) -> Files:
    """The source at ``root``. Raises ``DataError`` where no file matches."""
    keys = tuple(source.records.split(".")) if source.records else ()

    def cut(file: InputFile) -> Iterator[Piece]:
        spans: list[RecordSpan] = []
        start = 0
        try:
            for span in record_spans(file.path, keys):
                spans.append(span)
                end = span.start + span.num_bytes
                if end - start >= UNIT_BYTES:
                    yield RecordsPiece(
                        name=file.name, path=file.path, num_bytes=end - start, spans=tuple(spans), shape=source.shape
                    )
                    spans, start = [], end
            error = None
        except BadRecordError as bad:
            error = bad
            error.source = f"{file.name}:{bad.line}" if bad.line else file.name  # file.json#1 is its first record, not its line
        rest = file.stamp.size - start
        yield RecordsPiece(name=file.name, path=file.path, num_bytes=rest, spans=tuple(spans), shape=source.shape)
        if error is not None:
            yield BadPiece(name=file.name, path=file.path, num_bytes=0, error=error)

    return open_files(stream, source, root, digests, cut=cut)


def record_spans(path: Path, keys: tuple[str, ...]) -> Iterator[RecordSpan]:
    """Where the records of a file lie: the items of the list below ``keys``, or the object that the file is.

    Raises ``BadRecordError`` where the file goes against JSON in such a way that the rest of its records cannot be told apart.
    """
    with open(path, "rb") as file:
        scan = _Scan(file)
        for depth, key in enumerate(keys):
            scan.enter(key, ".".join(keys[:depth]))
        first = scan.peek()
        if first == b"{" and not keys:
            yield scan.record(0)
            if scan.peek():
                raise scan.error("more follows after the record; files of one record a line are read by kind: jsonl")
            return
        if first != b"[":
            where = f"'{'.'.join(keys)}'" if keys else "the file"
            allowed = "a list of records" if keys else "a list of records, or one record"
            raise scan.error(f"{where} is {_KINDS.get(first, 'a number or a word')}; {allowed} is needed")
        yield from _items(scan)
        for _ in keys:
            scan.leave()
        if scan.peek():
            raise scan.error("more follows after the end")


def _items(scan: _Scan) -> Iterator[RecordSpan]:
    """The items of the list at the cursor."""
    scan.step()
    number = 0
    if scan.peek() == b"]":
        scan.step()
        return
    while True:
        number += 1
        yield scan.record(number)
        mark = scan.peek()
        if mark not in (b",", b"]"):
            raise scan.error(f"after record {number:,} neither ',' nor ']' follows; the rest of the file is lost")
        scan.step()
        if mark == b"]":
            return


class _Scan:
    """A cursor over JSON that knows brackets and strings, and nothing of what is in them; a chunk at a time is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = b""
        self._at = 0
        self._base = 0
        self._line, self._counted = 1, 0
        self._more()
        if self._data.startswith(codecs.BOM_UTF8):
            self._at = len(codecs.BOM_UTF8)
        elif self._data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadRecordError("it begins like UTF-16; JSON is read as UTF-8", reason="undecodable")

    def error(self, message: str) -> BadRecordError:
        """``message`` said of the line of the cursor."""
        return BadRecordError(message, line=self._line_here())

    def peek(self) -> bytes:
        """The next byte that is no space, empty at the end."""
        while True:
            self._pass(_SPACE)
            if self._at < len(self._data):
                return self._data[self._at : self._at + 1]
            if not self._more():
                return b""

    def step(self) -> None:
        """Move over the byte that ``peek`` gave."""
        self._at += 1

    def record(self, number: int) -> RecordSpan:
        """Move over the value at the cursor, which is record ``number``, 0 for the only one."""
        return self._value(number, f"record {number:,}" if number else "the record")

    def _value(self, number: int, what: str) -> RecordSpan:
        first = self.peek()
        line, start = self._line_here(), self._base + self._at
        if not first or first in b",:]}":
            raise self.error(f"{what} is missing" if first else f"the file ends where {what} should begin")
        try:
            self._skip(first)
        except _EndError as error:
            raise BadRecordError(f"{what} begins here, and {error}", line=line) from None
        return RecordSpan(number=number, line=line, start=start, num_bytes=self._base + self._at - start)

    def enter(self, key: str, above: str) -> None:
        """Move to the value of ``key`` in the object at the cursor, which stands below ``above``."""
        where = f"'{above}'" if above else "the file"
        first = self.peek()
        if first != b"{":
            raise self.error(f"{where} is {_KINDS.get(first, 'a number or a word')}; an object with the key '{key}' is needed")
        self.step()
        names: list[str] = []
        while self.peek() == b'"':
            names.append(self._key())
            if self.peek() != b":":
                raise self.error(f"after the key '{names[-1]}' no ':' follows")
            self.step()
            if names[-1] == key:
                return
            self._value(0, f"the value of '{names[-1]}'")
            if self.peek() != b",":
                break
            self.step()
        if self.peek() != b"}":
            raise self.error(f"neither a key nor the end of {where} follows")
        raise self.error(f"there is no key '{key}' in {where}; its keys: {', '.join(names[:_NAMED_KEYS]) or 'none'}")

    def leave(self) -> None:
        """Move behind the end of the object that the cursor is in."""
        try:
            self._to_end(1)
        except _EndError as error:
            raise self.error(f"after the records, {error}") from None

    def _line_here(self) -> int:
        self._line += self._data.count(b"\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _more(self) -> bool:
        """Bring the next chunk into memory, after what is left of this one; False at the end of the file."""
        chunk = self._file.read(_READ_BYTES)
        if not chunk:
            return False
        self._line_here()
        self._data = self._data[self._at :] + chunk
        self._base += self._at
        self._at = self._counted = 0
        return True

    def _pass(self, pattern: re.Pattern[bytes]) -> None:
        """Move over what ``pattern`` matches here in the chunk; it may match nothing."""
        found = pattern.match(self._data, self._at)
        assert found is not None
        self._at = found.end()

    def _key(self) -> str:
        while (found := _STRING.match(self._data, self._at)) is None:
            if len(self._data) - self._at > _MAX_KEY_BYTES or not self._more():
                raise self.error("a key has no end")
        self._at = found.end()
        try:
            return str(parse(found[0].decode()))
        except (BadRecordError, UnicodeDecodeError) as error:
            raise self.error(f"a key cannot be read: {error}") from None

    def _skip(self, first: bytes) -> None:
        if first == b'"':
            self.step()
            self._to_quote()
        elif first in b"[{":
            self.step()
            self._to_end(1)
        else:
            self._pass(_SCALAR)
            while self._at == len(self._data) and self._more():
                self._pass(_SCALAR)

    def _to_end(self, depth: int) -> None:
        """Move behind the bracket that brings ``depth`` to 0. Raises ``_EndError``."""
        while True:
            self._pass(_TO_BRACKET)
            mark = self._data[self._at : self._at + 1]
            if not mark:
                if not self._more():
                    raise _EndError("the file ends too early")
                continue
            self._at += 1
            if mark == b'"':  # a string that goes on in the next chunk
                self._to_quote()
                continue
            depth += 1 if mark in b"[{" else -1
            if depth == 0:
                return
            if depth > _MAX_DEPTH:
                raise _EndError(f"more than {_MAX_DEPTH:,} levels are nested; the rest of the file is lost")

    def _to_quote(self) -> None:
        """Move behind the quote that ends the string the cursor is in. Raises ``_EndError``."""
        while True:
            self._pass(_INSIDE_STRING)
            if self._data[self._at : self._at + 1] == b'"':
                self._at += 1
                return
            if not self._more():  # the end, or a backslash whose other half is to come
                raise _EndError("the file ends within a text")


class _EndError(Exception):
    """Says why the end of a value was not found."""
