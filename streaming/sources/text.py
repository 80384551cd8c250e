"""Source ``text``: files, each of which is one document."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outgrow.errors import DataError
from outgrow.recipes.schema.data import OnError, TextSource
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, UNIT_BYTES, Document, Input, Skipped, Unit
from outgrow.streaming.sources.encoding import UndecodableError, decode
from outgrow.streaming.sources.files import InputFiles, find_files


@dataclass(frozen=True, kw_only=True)
class TextUnit:
    """Some files, by name and path."""

    files: tuple[tuple[str, Path], ...]
    num_bytes: int
    encoding: str
    on_error: OnError

    def documents(self) -> Iterator[Document | Skipped]:
        for name, path in self.files:
            yield self._document(name, path)

    def _document(self, name: str, path: Path) -> Document | Skipped:
        try:
            text, encoding = decode(path.read_bytes(), self.encoding)
        except UndecodableError as error:
            if self.on_error == "skip":
                return Skipped(source=name, reason="undecodable")
            raise DataError(
                f"the file cannot be read as text: {error}",
                where=str(path),
                hint="set the source's encoding, exclude the file, or set on_error: skip",
            ) from None
        if not text:
            return Skipped(source=name, reason="empty")
        return Document(text=text, source=name, meta={} if encoding == "utf-8" else {"encoding": encoding})


class TextFiles:
    """The opened source."""

    def __init__(self, source: TextSource, files: InputFiles) -> None:
        self._source = source
        self._files = files

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self._files.inputs

    def check_unchanged(self) -> None:
        self._files.check_unchanged()

    def units(self) -> Iterator[Unit]:
        yield from self._files.skipped_units()
        batch: list[tuple[str, Path]] = []
        num_bytes = 0
        for file in self._files.files:
            batch.append((file.name, file.path))
            num_bytes += file.stamp.size
            if num_bytes >= UNIT_BYTES:
                yield self._unit(batch, num_bytes)
                batch, num_bytes = [], 0
        if batch:
            yield self._unit(batch, num_bytes)

    def _unit(self, files: list[tuple[str, Path]], num_bytes: int) -> TextUnit:
        return TextUnit(files=tuple(files), num_bytes=num_bytes, encoding=self._source.encoding, on_error=self._source.on_error)


def open_text(stream: str, source: TextSource, root: str, digests: DigestCache) -> TextFiles:
    """The source at ``root``. Raises ``DataError`` where no file matches or a file is too long for one document."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8" if source.encoding == "auto" else source.encoding)
    except LookupError:
        raise DataError(
            f"stream '{stream}': there is no text encoding '{source.encoding}'", hint="give a Python codec name, or auto"
        ) from None
    found = find_files(stream, root, source.include, source.exclude, on_error=source.on_error)
    for file in found.files:
        if file.stamp.size > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{file.stamp.size:,} bytes are too long for one document; at most {MAX_DOCUMENT_BYTES:,}",
                where=str(file.path),
                hint="divide it into files, or into JSON lines (source kind jsonl)",
            )
    return TextFiles(source, InputFiles(stream, found, digests, lambda path: path.stat().st_size))
