"""Sources of documents, one file a kind: ``text``, ``jsonl``, ``mds`` and ``custom``."""

from __future__ import annotations

from outgrow.recipes.schema.data import CustomSource, JsonlSource, MdsSource, Stream, TextSource
from outgrow.recipes.schema.site import Site
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import Document, Input, Skipped, Source, Unit

__all__ = ["Document", "Input", "Skipped", "Source", "Unit", "open_source"]


def open_source(stream: Stream, site: Site, digests: DigestCache) -> Source:
    """The source of a stream on this machine. Raises ``DataError`` where it is missing, empty or unusable."""
    match stream.source:
        case TextSource() as source:
            from outgrow.streaming.sources.text import open_text

            return open_text(stream.name, source, site.locate(source.path), digests)
        case JsonlSource() as source:
            from outgrow.streaming.sources.jsonl import open_jsonl

            return open_jsonl(stream.name, source, site.locate(source.path), digests)
        case MdsSource() as source:
            from outgrow.streaming.sources.mds import open_mds

            return open_mds(stream.name, source, site.locate(source.path), digests)
        case CustomSource() as source:
            from outgrow.streaming.sources.custom import open_custom

            return open_custom(source)
