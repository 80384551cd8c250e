"""Sources for tests: opened from a recipe's section, and read whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from text_recipes import make_recipe, make_site

from outgrow.errors import DataError
from outgrow.streaming.sources import Document, Dropped, Source, open_source
from outgrow.streaming.sources.digests import DigestCache


def opened(root: Path, folder: Path, **source: Any) -> Source:
    """The source of the section ``source`` at ``folder`` (or a file), with its cache below ``root``."""
    preference = source.get("shape", {}).get("kind") == "preference"
    stream = {"name": "s", "source": {"path": "folder", **source}} | ({"split": "never"} if preference else {})
    recipe = make_recipe(stream)
    return open_source(recipe.data.streams[0], make_site(root, folder=folder), DigestCache(root / "cache"))


def everything(source: Source) -> list[Document | Dropped]:
    return [document for unit in source.units() for document in unit.documents()]


def kept(source: Source) -> list[Document]:
    """The documents; nothing may have been dropped."""
    found = everything(source)
    assert all(isinstance(item, Document) for item in found), [item for item in found if isinstance(item, Dropped)]
    return [item for item in found if isinstance(item, Document)]


def texts(source: Source) -> list[str]:
    """The documents' texts, whatever else was dropped."""
    contents = [item.content for item in everything(source) if isinstance(item, Document)]
    assert all(isinstance(content, str) for content in contents)
    return [str(content) for content in contents]


def dropped(source: Source) -> list[tuple[str, str]]:
    """Source and reason of what was dropped."""
    return [(item.source, item.reason) for item in everything(source) if isinstance(item, Dropped)]


def refused(root: Path, folder: Path, message: str, **source: Any) -> str:
    """The whole message of the ``DataError`` that stops the build at opening or reading; ``message`` (a pattern) is in it."""
    with pytest.raises(DataError) as caught:
        everything(opened(root, folder, on_error="stop", **source))
    text = str(caught.value)
    assert re.search(message, text, flags=re.DOTALL), text
    return text
