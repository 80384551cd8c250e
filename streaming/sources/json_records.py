"""One record as JSON to a document: what the kinds ``jsonl`` and ``json`` have in common."""

from __future__ import annotations

import codecs

from outgrow.recipes.schema.sources import Shape
from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, BadRecordError, Document
from outgrow.streaming.sources.json_text import parse
from outgrow.streaming.sources.reading import QUARANTINE_BYTES
from outgrow.streaming.sources.shapes import document


def read_record(data: bytes, shape: Shape, source: str, line: int) -> Document | BadRecordError:
    """The document of a record that begins in ``line``, or why it is none."""
    try:
        return document(shape, parse(_decoded(data)), source)
    except BadRecordError as bad:
        bad.line, bad.source, bad.content = line, source, _beginning(data)
        return bad


def too_long(num_bytes: int, beginning: bytes, source: str, line: int) -> BadRecordError:
    """Why a record of ``num_bytes`` is none."""
    message = f"the record has {num_bytes:,} bytes; at most {MAX_DOCUMENT_BYTES:,} make one document"
    return BadRecordError(message, line=line, source=source, content=_beginning(beginning))


def _decoded(data: bytes) -> str:
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise BadRecordError(f"byte {error.start} is not UTF-8" + ("; it begins like UTF-16" if utf16 else "")) from None


def _beginning(data: bytes) -> str:
    return data[:QUARANTINE_BYTES].decode(errors="replace")
