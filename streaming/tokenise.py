"""Work units to token blocks: read, decode, encode, and choose each document's split. Runs in the processes of a build."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.streaming.sources import Document, Skipped, Unit
from outgrow.streaming.sources.document import SkipReason
from outgrow.streaming.tokenizer import TextTokenizer, Tokens

_BATCH_CHARS = 256 * 1024
"""Characters that are encoded at once."""


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """The documents of one unit of stream number ``stream``: ``tokens`` uint16 or uint32, one after the other, each with its
    end-of-text token.

    ``lengths`` int64 [documents]; ``validation``, ``sources`` and ``metas`` have one a document; ``num_bytes`` is the unit's.
    """

    stream: int
    num_bytes: int
    tokens: Tokens
    lengths: npt.NDArray[np.int64]
    validation: tuple[bool, ...]
    sources: tuple[str, ...]
    metas: tuple[dict[str, Any], ...]
    skipped: dict[SkipReason, int]

    def documents(self) -> Iterator[tuple[Tokens, str, dict[str, Any], bool]]:
        """Tokens, source, meta and whether it is held out for validation, of each document."""
        ends = np.cumsum(self.lengths).tolist()
        for end, length, source, meta, validation in zip(
            ends, self.lengths.tolist(), self.sources, self.metas, self.validation, strict=True
        ):
            yield self.tokens[end - length : end], source, meta, validation


class Tokenise:
    """Turns units into token blocks with the tokenizer in ``folder``."""

    def __init__(self, folder: Path, validation_fraction: float) -> None:
        self._tokenizer = TextTokenizer(folder)
        self._fraction = validation_fraction

    def __call__(self, work: tuple[int, Unit]) -> TokenBlock:
        """The block of a unit, given with the number of its stream."""
        stream, unit = work
        tokens: list[Tokens] = []
        validation: list[bool] = []
        sources: list[str] = []
        metas: list[dict[str, Any]] = []
        skipped: Counter[SkipReason] = Counter()
        for batch in _batches(unit.documents(), skipped):
            tokens += self._encode(batch)
            validation += [held_out(document, self._fraction) for document in batch]
            sources += [document.source for document in batch]
            metas += [document.meta for document in batch]
        return TokenBlock(
            stream=stream,
            num_bytes=unit.num_bytes,
            tokens=tokens[0] if len(tokens) == 1 else np.concatenate([np.empty(0, self._tokenizer.dtype), *tokens]),
            lengths=np.array([len(part) for part in tokens], np.int64),
            validation=tuple(validation),
            sources=tuple(sources),
            metas=tuple(metas),
            skipped=dict(skipped),
        )

    def _encode(self, documents: list[Document]) -> list[Tokens]:
        encoded = iter(self._tokenizer.encode([document.text for document in documents if document.text is not None]))
        return [self._checked(document) if document.token_ids is not None else next(encoded) for document in documents]

    def _checked(self, document: Document) -> Tokens:
        """The token ids that a document came with, and the end-of-text token unless it ends with that."""
        token_ids, eos = document.token_ids, self._tokenizer.eos_token_id
        assert token_ids is not None
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < self._tokenizer.vocab_size:
            raise DataError(
                f"token ids from {token_ids.min()} to {token_ids.max()} are not of this tokenizer "
                f"({self._tokenizer.vocab_size:,} tokens)",
                where=document.source,
                hint="set data.tokenizer to the folder of the tokenizer that made them",
            )
        tokens: Tokens = token_ids.astype(self._tokenizer.dtype)
        return tokens if len(tokens) and tokens[-1] == eos else np.append(tokens, self._tokenizer.dtype.type(eos))


def held_out(document: Document, fraction: float) -> bool:
    """Whether a document is validated on: by the digest of its content, so equal documents are on the same side."""
    content = hashlib.sha256()
    if document.text is not None:
        for start in range(0, len(document.text), _BATCH_CHARS):  # in parts: no second copy of a long text
            content.update(document.text[start : start + _BATCH_CHARS].encode())
    else:
        assert document.token_ids is not None
        content.update(document.token_ids.astype("<i8").data)
    return int.from_bytes(content.digest()[:8], "big") < fraction * 2**64


def _batches(documents: Iterable[Document | Skipped], skipped: Counter[SkipReason]) -> Iterator[list[Document]]:
    """Documents in batches of about ``_BATCH_CHARS``; what was skipped is counted in ``skipped``."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        if isinstance(document, Skipped):
            skipped[document.reason] += 1
            continue
        batch.append(document)
        num_chars += len(document.text or "")
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
