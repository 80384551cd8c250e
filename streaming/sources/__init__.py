"""Sources of documents, one module a kind; a kind's module is imported when a recipe uses it."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.sources import CustomSource, FileSource, JsonlSource, JsonSource, MdsSource, ParquetSource
from outgrow.recipes.schema.streams import Stream
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import (
    MAX_DOCUMENT_BYTES,
    BadRecordError,
    Dialogue,
    Document,
    Dropped,
    Input,
    PreferencePair,
    Source,
    Unit,
)
from outgrow.streaming.sources.encoding import check_encoding
from outgrow.streaming.sources.reading import FileReader, open_whole_files

__all__ = [
    "BadRecordError",
    "Dialogue",
    "Document",
    "Dropped",
    "FileReader",
    "Input",
    "PreferencePair",
    "Source",
    "Unit",
    "file_reader",
    "open_source",
]

_READERS = {
    "text": "text",
    "markdown": "markdown",
    "epub": "epub",
    "fb2": "fb2",
    "docx": "docx",
    "pdf": "pdf",
    "transcript": "transcript",
    "yaml": "yaml_files",
}
"""Kinds whose files are read whole, and the module of each, whose ``reader`` makes its ``FileReader``."""

_CONTAINERS = ("epub", "docx", "pdf")
"""Kinds whose files hold pictures too: not the file's size is bounded, but what is read of it."""


def open_source(stream: Stream, site: Site, digests: DigestCache) -> Source:
    """The source of a stream on this machine. Raises ``DataError`` where it is missing, empty or unusable."""
    name = stream.name
    match stream.source:
        case CustomSource() as source:
            from outgrow.streaming.sources.custom import open_custom

            return open_custom(source)
        case MdsSource() as source:
            from outgrow.streaming.sources.mds import open_mds

            return open_mds(name, source, site.locate(source.path), digests)
        case JsonlSource() as source:
            from outgrow.streaming.sources.jsonl import open_jsonl

            return open_jsonl(name, source, site.locate(source.path), digests)
        case JsonSource() as source:
            from outgrow.streaming.sources.json_files import open_json

            return open_json(name, source, site.locate(source.path), digests)
        case ParquetSource() as source:
            from outgrow.streaming.sources.parquet import open_parquet

            return open_parquet(name, source, site.locate(source.path), digests)
        case source:
            check_encoding(name, getattr(source, "encoding", "auto"))
            limit = None if source.kind in _CONTAINERS else MAX_DOCUMENT_BYTES
            return open_whole_files(name, source, site.locate(source.path), digests, file_reader(source), max_bytes=limit)


def file_reader(source: FileSource) -> FileReader:
    """How the files of a source are read, for kinds that read them whole."""
    module = import_module(f"{__name__}.{_READERS[source.kind]}")  # type: ignore[attr-defined]
    return cast(FileReader, module.reader(source))
