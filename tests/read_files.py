"""What the reader of a kind makes of one file, and of bytes that a test makes up."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from outgrow.recipes.schema.sources import Source
from outgrow.streaming.sources import BadRecordError, Document, file_reader

FILES = Path(__file__).parent / "files"
"""Files that other programs wrote; README.md there says which."""


def read(kind: str, path: Path, **options: Any) -> list[Document | BadRecordError]:
    """All that the reader yields, by a reader that crossed to another process."""
    source: Any = TypeAdapter(Source).validate_python({"kind": kind, "path": "books", **options})
    reader = pickle.loads(pickle.dumps(file_reader(source)))
    return list(reader.read(path, path.name))


def read_one(kind: str, path: Path, **options: Any) -> Document:
    """The one document of a file."""
    (document,) = read(kind, path, **options)
    assert isinstance(document, Document), document
    return document


def text_of(kind: str, path: Path, **options: Any) -> str:
    """Its text."""
    content = read_one(kind, path, **options).content
    assert isinstance(content, str)
    return content


def refused(kind: str, path: Path, message: str, **options: Any) -> BadRecordError:
    """What the reader raises, or yields as the one thing; ``message`` is a pattern."""
    try:
        (bad,) = read(kind, path, **options)
    except BadRecordError as raised:
        bad = raised
    assert isinstance(bad, BadRecordError), bad
    with pytest.raises(BadRecordError, match=message):
        raise bad
    return bad
