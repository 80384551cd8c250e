"""Source ``text``: files, each of which is one document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outgrow.recipes.schema.sources import TextSource
from outgrow.streaming.sources.document import Document
from outgrow.streaming.sources.encoding import read_text


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """The whole file is the text."""

    encoding: str

    def read(self, path: Path, name: str) -> Iterator[Document]:
        text, encoding = read_text(path, self.encoding)
        yield Document(content=text, source=name, meta=encoding_meta(encoding))


def encoding_meta(encoding: str) -> dict[str, Any]:
    """What metadata say of the encoding that a file was in: nothing of UTF-8."""
    return {} if encoding == "utf-8" else {"encoding": encoding}


def reader(source: TextSource) -> TextReader:
    """How files of the source are read."""
    return TextReader(encoding=source.encoding)
