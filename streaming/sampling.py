"""Text to train a tokenizer on, and a forecast of the token store's size, from a part of the sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

from outgrow.errors import DataError
from outgrow.recipes.schema.data import Data
from outgrow.streaming.cleaning import Cleaner
from outgrow.streaming.contents import texts_of
from outgrow.streaming.document_table import SIGNATURE_SIZE
from outgrow.streaming.selection import needs_signatures
from outgrow.streaming.sources.document import Document, Source
from outgrow.streaming.tokenizer import TextTokenizer

_FORECAST_BYTES = 256 * 1024
"""Text of each stream, in whole units, that a forecast is made from, and characters of each document of it."""
_RECORD_BYTES = 128
"""Bytes of a document in the store beside its tokens, source and metadata: offsets, column sizes, its row of the document
table."""
_BORDER_CHARS = 40
"""Fewest characters of a sentence or turn, each of which takes 4 bytes of the document table."""
_TEMPLATE_TOKENS = 8
"""Tokens that a chat template adds to a message."""
_MARGIN = 1.2


def sample_texts(data: Data, sources: Mapping[str, Source], limit_bytes: int) -> Iterator[str]:
    """Texts, cleaned as the streams ask, of at most ``limit_bytes`` in UTF-8, the same share of every part of every stream that
    is trained on; a pure function of the inputs. Dialogues give the texts of their messages.

    Raises ``DataError`` where a source holds token ids instead of text.
    """
    total = sum(item.text_bytes for stream in data.trained for item in sources[stream.name].inputs)
    share = limit_bytes / max(total, 1)
    # All of it may be had: then the limit is one for all, as text can be longer in UTF-8 than in its file.
    left = float(limit_bytes) if share >= 1 else 0.0
    for stream in data.trained:
        cleaner = Cleaner(stream.clean)
        for unit in sources[stream.name].units():
            left += unit.num_bytes * share if share < 1 else 0.0
            for document in unit.documents():
                if left < 1:
                    break
                for text in _texts(document) if isinstance(document, Document) else ():
                    sampled = _first_bytes(cleaner(text[: int(left)])[0], int(left))
                    left -= len(sampled.encode())
                    yield sampled


def _texts(document: Document) -> list[str]:
    if isinstance(document.content, np.ndarray):
        raise DataError(
            "the document holds token ids; a tokenizer is trained on text",
            where=document.source,
            hint="set data.tokenizer to the folder of the tokenizer that made them",
        )
    return texts_of(document.content)


def _first_bytes(text: str, num_bytes: int) -> str:
    return text.encode()[:num_bytes].decode(errors="ignore")


def forecast_bytes(data: Data, sources: Mapping[str, Source], tokenizer: TextTokenizer) -> int:
    """Bytes that a token store of the sources takes, with a margin of a fifth: what the first documents of each stream take,
    scaled to the whole."""
    record_bytes = _RECORD_BYTES + (4 * SIGNATURE_SIZE if needs_signatures(data) else 0)
    return sum(_forecast(source, tokenizer, record_bytes) for source in sources.values())


def _forecast(source: Source, tokenizer: TextTokenizer, record_bytes: int) -> int:
    read, stored = 0, 0.0
    for unit in source.units():
        documents = (document for document in unit.documents() if isinstance(document, Document))
        stored += sum(record_bytes + _stored(document, tokenizer) for document in documents)
        read += unit.num_bytes
        if read >= _FORECAST_BYTES:
            break
    total = sum(item.text_bytes for item in source.inputs)
    return int(_MARGIN * stored * max(1.0, total / max(read, 1)))


def _stored(document: Document, tokenizer: TextTokenizer) -> float:
    """Bytes of a document's content, source and metadata in the store; of a long text only the beginning is encoded."""
    content, token_bytes = document.content, tokenizer.dtype.itemsize
    given = float(len(document.source) + len(json.dumps(document.meta)))
    if isinstance(content, np.ndarray):
        return given + len(content) * token_bytes
    texts = texts_of(content)
    chars = sum(map(len, texts))
    beginning = "\n".join(texts)[:_FORECAST_BYTES]
    tokens = len(tokenizer.encode([beginning])[0]) * (chars / max(len(beginning), 1))
    if not isinstance(content, str):
        tokens += _TEMPLATE_TOKENS * len(texts)
        token_bytes += 4  # a loss weight each
    return given + tokens * token_bytes + 4 * chars / _BORDER_CHARS
