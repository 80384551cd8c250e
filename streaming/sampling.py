"""Text to train a tokenizer on, and a forecast of the token store's size, from a part of the sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from outgrow.errors import DataError
from outgrow.streaming.sources import Document, Skipped, Source
from outgrow.streaming.tokenizer import TextTokenizer

_FORECAST_BYTES = 256 * 1024
"""Text of each stream, in whole units, that a forecast is made from, and characters of each document of it."""
_RECORD_BYTES = 64
"""Bytes of a document in the store beside its tokens, source and metadata: offsets, column sizes, counts."""
_MARGIN = 1.2


def sample_texts(sources: Sequence[Source], limit_bytes: int) -> Iterator[str]:
    """Texts of at most ``limit_bytes`` in UTF-8, the same share of every part of every stream; a pure function of the inputs.

    Raises ``DataError`` where a source holds token ids instead of text.
    """
    total = sum(item.text_bytes for source in sources for item in source.inputs)
    share = limit_bytes / max(total, 1)
    # All of it may be had: then the limit is one for all, as text can be longer in UTF-8 than in its file.
    left = float(limit_bytes) if share >= 1 else 0.0
    for source in sources:
        for unit in source.units():
            left += unit.num_bytes * share if share < 1 else 0.0
            for document in unit.documents():
                if left < 1:
                    break
                text = _first_bytes(document, int(left))
                left -= len(text.encode())
                yield text


def _first_bytes(document: Document | Skipped, num_bytes: int) -> str:
    if isinstance(document, Skipped):
        return ""
    if document.text is None:
        raise DataError(
            "the document holds token ids; a tokenizer is trained on text",
            where=document.source,
            hint="set data.tokenizer to the folder of the tokenizer that made them",
        )
    return document.text[:num_bytes].encode()[:num_bytes].decode(errors="ignore")


def forecast_bytes(sources: Sequence[Source], tokenizer: TextTokenizer) -> int:
    """Bytes that a token store of the sources takes, with a margin of a fifth: what the first documents of each stream take,
    scaled to the whole."""
    return sum(_forecast(source, tokenizer) for source in sources)


def _forecast(source: Source, tokenizer: TextTokenizer) -> int:
    read, stored = 0, 0.0
    for unit in source.units():
        stored += sum(_stored(document, tokenizer) for document in unit.documents() if isinstance(document, Document))
        read += unit.num_bytes
        if read >= _FORECAST_BYTES:
            break
    total = sum(item.text_bytes for item in source.inputs)
    return int(_MARGIN * stored * max(1.0, total / max(read, 1)))


def _stored(document: Document, tokenizer: TextTokenizer) -> float:
    """Bytes of a document in the store; of a long text only the beginning is encoded."""
    if document.text is None:
        assert document.token_ids is not None
        tokens = float(len(document.token_ids))
    else:
        beginning = document.text[:_FORECAST_BYTES]
        tokens = len(tokenizer.encode([beginning])[0]) * (len(document.text) / max(len(beginning), 1))
    return tokens * tokenizer.dtype.itemsize + len(document.source) + len(json.dumps(document.meta)) + _RECORD_BYTES
