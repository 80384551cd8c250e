"""Source ``jsonl``: JSON lines, plain or compressed, each of which is one document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from outgrow.errors import DataError
from outgrow.recipes.schema.data import JsonlSource, OnError
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import Document, Input, Skipped, Unit
from outgrow.streaming.sources.files import InputFiles, find_files
from outgrow.streaming.sources.lines import LineBlock, line_blocks, text_bytes


@dataclass(frozen=True, kw_only=True)
class JsonlUnit:
    """A block of lines of the file ``name``."""

    name: str
    block: LineBlock
    text_field: str
    on_error: OnError

    @property
    def num_bytes(self) -> int:
        return self.block.num_bytes

    def documents(self) -> Iterator[Document | Skipped]:
        for number, line in self.block.lines():
            yield self._document(f"{self.name}#{number}", number, line)

    def _document(self, source: str, number: int, line: bytes) -> Document | Skipped:
        if not line.strip():
            return Skipped(source=source, reason="empty")
        try:
            text, meta = _parse(line, self.text_field)
        except (ValueError, RecursionError) as error:
            if self.on_error == "skip":
                return Skipped(source=source, reason="malformed")
            raise DataError(
                f"the line is not a document: {error}",
                where=f"{self.block.path}:{number}",
                hint="correct it, set the source's text_field, or set on_error: skip",
            ) from None
        return Document(text=text, source=source, meta=meta) if text else Skipped(source=source, reason="empty")


def _parse(line: bytes, text_field: str) -> tuple[str, dict[str, Any]]:
    """The text and the other keys of a line. Raises ``ValueError`` that says what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8-sig"))  # strict, where json.loads(bytes) lets half surrogates pass
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {type(value).__name__}")
    if text_field not in value:
        raise ValueError(f"it has no key '{text_field}'; its keys: {', '.join(list(value)[:10])}")
    text = value.pop(text_field)
    if not isinstance(text, str):
        raise ValueError(f"the value of '{text_field}' is {type(text).__name__}, not a string")
    if b"\\ud" in line or b"\\uD" in line:
        _check_surrogates(text, value)
    return text, value


def _check_surrogates(text: str, meta: dict[str, Any]) -> None:
    """JSON may spell half of a surrogate pair, which is no text in any encoding. Raises ``ValueError``."""
    try:
        text.encode()
        json.dumps(meta, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair (\\ud800 to \\udfff)") from None


class JsonlFiles:
    """The opened source."""

    def __init__(self, source: JsonlSource, files: InputFiles) -> None:
        self._source = source
        self._files = files

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self._files.inputs

    def check_unchanged(self) -> None:
        self._files.check_unchanged()

    def units(self) -> Iterator[Unit]:
        yield from self._files.skipped_units()
        for file in self._files.files:
            for block in line_blocks(file.path):
                yield JsonlUnit(name=file.name, block=block, text_field=self._source.text_field, on_error=self._source.on_error)


def open_jsonl(stream: str, source: JsonlSource, root: str, digests: DigestCache) -> JsonlFiles:
    """The source at ``root``. Raises ``DataError`` where no file matches."""
    found = find_files(stream, root, source.include, source.exclude, on_error=source.on_error)
    return JsonlFiles(source, InputFiles(stream, found, digests, text_bytes))
