"""Source ``markdown``: files, each of which is one document; YAML front matter becomes metadata, and the rest is the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outgrow.recipes import yaml_marks
from outgrow.recipes.schema.sources import MarkdownSource
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.encoding import read_text
from outgrow.streaming.sources.text import encoding_meta

_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", flags=re.DOTALL | re.MULTILINE)
_MAX_CHARS = 256 * 1024
"""What stands between lines of dashes farther apart is no front matter."""


@dataclass(frozen=True, kw_only=True)
class MarkdownReader:
    """The file less its front matter is the text."""

    encoding: str

    def read(self, path: Path, name: str) -> Iterator[Document]:
        text, encoding = read_text(path, self.encoding)
        try:
            meta, start = front_matter(text)
        except BadRecordError as bad:
            bad.source = name
            raise
        yield Document(content=text[start:] if start else text, source=name, meta={**meta, **encoding_meta(encoding)})


def front_matter(text: str) -> tuple[dict[str, Any], int]:
    """The metadata that a text begins with, and where the rest begins: ``{}`` and 0 where it begins with none.

    It is read by the rules of recipes: dates are text; aliases, tags and keys given twice are refused. Raises
    ``BadRecordError`` with the line.
    """
    found = _FRONT_MATTER.match(text, 0, _MAX_CHARS) if text.startswith("---") else None
    if found is None:
        return {}, 0
    document, problems = yaml_marks.parse("\n" + found[1], "")  # the line of dashes counts too
    if problems:
        first = problems[0]
        message = f"{first.key}: {first.message}" if first.key else first.message
        raise BadRecordError(f"the front matter: {message}", line=int(first.where.removeprefix(":") or 1))
    if isinstance(document.data, dict):
        return document.data, found.end()
    return {}, found.end() if document.data is None else 0  # words between two lines of dashes are text


def reader(source: MarkdownSource) -> MarkdownReader:
    """How files of the source are read."""
    return MarkdownReader(encoding=source.encoding)
