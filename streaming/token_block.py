"""What a process of the build hands back for one work unit: its documents as tokens, and what the store keeps of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.streaming.document_table import SIGNATURE_SIZE, DocumentTable
from outgrow.streaming.sources.document import Dropped

Tokens: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Float32: TypeAlias = npt.NDArray[np.float32]
Int32: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredDocument:
    """One document as the store keeps it.

    ``tokens`` uint16 or uint32 [n], n >= 1; ``weights`` float32 [n], None: all 1; ``spans`` int32 [2, 2] of a preference pair;
    ``borders`` int32 [k] ascending, never 0; ``meta`` a JSON object; ``content`` the first 16 bytes of the sha256 of its
    content; ``language`` a code of two letters, "" where not known, None where not asked for; ``signature`` uint32 [128]
    likewise.
    """

    tokens: Tokens
    source: str
    meta: str
    validation: bool
    content: bytes
    chars: int
    borders: Int32
    weights: Float32 | None = None
    spans: Int32 | None = None
    language: str | None = None
    signature: npt.NDArray[np.uint32] | None = None


class Sample(NamedTuple):
    """A document as it goes into a shard; ``weights`` is None where all are 1, ``spans`` but for preference pairs."""

    tokens: Tokens
    weights: Float32 | None
    spans: Int32 | None
    source: str
    meta: str
    validation: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenBlock:
    """The documents of one unit of stream number ``stream``, and what was left out of it.

    ``tokens`` uint16 or uint32, one document after the other; ``weights`` float32 of those documents alone whose weights are
    not all 1; ``spans`` int32 [pairs, 2, 2] of the documents that ``paired`` bool [N] marks; ``table`` has their columns, with
    no shard yet. ``cleaned`` has for each cleaning step how many documents it changed, and how many changes it made.
    ``num_bytes`` is the unit's.
    """

    stream: int
    num_bytes: int
    tokens: Tokens
    weights: Float32
    spans: Int32
    paired: npt.NDArray[np.bool_]
    validation: npt.NDArray[np.bool_]
    table: DocumentTable
    sources: tuple[str, ...]
    metas: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    cleaned: tuple[tuple[int, int], ...]

    def samples(self) -> Iterator[Sample]:
        """Its documents in order; arrays are views."""
        token_at = weight_at = pair_at = 0
        uniform, paired, validation = self.table.uniform.tolist(), self.paired.tolist(), self.validation.tolist()
        for number, length in enumerate(self.table.lengths.tolist()):
            tokens = self.tokens[token_at : token_at + length]
            token_at += length
            weights = spans = None
            if not uniform[number]:
                weights = self.weights[weight_at : weight_at + length]
                weight_at += length
            if paired[number]:
                spans = self.spans[pair_at]
                pair_at += 1
            yield Sample(tokens, weights, spans, self.sources[number], self.metas[number], validation[number])


def make_block(
    documents: Sequence[StoredDocument],
    *,
    stream: int,
    num_bytes: int,
    dropped: Sequence[Dropped] = (),
    cleaned: Sequence[tuple[int, int]] = (),
) -> TokenBlock:
    """The block of a unit's documents."""
    weighted = [_weights(document) for document in documents]
    return TokenBlock(
        stream=stream,
        num_bytes=num_bytes,
        tokens=_joined([document.tokens for document in documents], np.uint16),
        weights=_joined([weights for weights in weighted if weights is not None], np.float32),
        spans=np.array([d.spans for d in documents if d.spans is not None], np.int32).reshape(-1, 2, 2),
        paired=np.array([document.spans is not None for document in documents], np.bool_),
        validation=np.array([document.validation for document in documents], np.bool_),
        table=_table(documents, weighted),
        sources=tuple(document.source for document in documents),
        metas=tuple(document.meta for document in documents),
        dropped=tuple(dropped),
        cleaned=tuple(cleaned),
    )


def _table(documents: Sequence[StoredDocument], weighted: Sequence[Float32 | None]) -> DocumentTable:
    languages = [d.language for d in documents if d.language is not None]
    signatures = [d.signature for d in documents if d.signature is not None]
    codes = "".join(code.ljust(2, "\0") for code in languages).encode("ascii")
    return DocumentTable(
        lengths=np.array([len(document.tokens) for document in documents], np.int64),
        shard=np.zeros(len(documents), np.int32),
        weight=np.array([_weight(d, weights) for d, weights in zip(documents, weighted, strict=True)], np.float64),
        uniform=np.array([weights is None for weights in weighted], np.bool_),
        chars=np.array([document.chars for document in documents], np.int64),
        content=np.frombuffer(b"".join(document.content for document in documents), "<u8").astype(np.uint64).reshape(-1, 2),
        border_counts=np.array([len(document.borders) for document in documents], np.int32),
        borders=_joined([document.borders for document in documents], np.int32),
        language=np.frombuffer(codes, np.uint8).reshape(-1, 2) if languages else None,
        signature=np.stack(signatures).reshape(-1, SIGNATURE_SIZE) if signatures else None,
    )


def _weights(document: StoredDocument) -> Float32 | None:
    """Its weights, None where all are 1."""
    return None if document.weights is None or bool(np.all(document.weights == 1)) else document.weights


def _weight(document: StoredDocument, weights: Float32 | None) -> float:
    """Sum of the weights of its targets: of all tokens but the first of the document, or of each answer of a pair."""
    spans = [(0, len(document.tokens))] if document.spans is None else document.spans.tolist()
    if weights is None:
        return float(sum(max(stop - start - 1, 0) for start, stop in spans))
    return float(sum(weights[start + 1 : stop].sum(dtype=np.float64) for start, stop in spans))


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    """The arrays one after the other; an empty one of ``dtype`` where there is none."""
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


# --- tables -----------------------------------------------------------------------------------------------------------


def choose(table: DocumentTable, chosen: npt.NDArray[np.bool_]) -> DocumentTable:
    """The documents that ``chosen`` bool [N] marks."""
    if chosen.all():
        return table
    columns = {name: column[chosen] for name, column in table.arrays.items() if name != "borders"}
    return DocumentTable(**columns, borders=table.borders[np.repeat(chosen, table.border_counts)])


def join(tables: Sequence[DocumentTable], *, languages: bool, signatures: bool) -> DocumentTable:
    """The documents of all tables in order. ``languages`` and ``signatures`` say which of these columns it has: a table without
    a document cannot tell."""
    filled = [table for table in tables if len(table)]
    empty = _empty(languages=languages, signatures=signatures)
    names = [field.name for field in fields(DocumentTable) if getattr(empty, field.name) is not None]
    return DocumentTable(**{name: np.concatenate([getattr(table, name) for table in (empty, *filled)]) for name in names})


def _empty(*, languages: bool, signatures: bool) -> DocumentTable:
    return DocumentTable(
        lengths=np.empty(0, np.int64),
        shard=np.empty(0, np.int32),
        weight=np.empty(0, np.float64),
        uniform=np.empty(0, np.bool_),
        chars=np.empty(0, np.int64),
        content=np.empty((0, 2), np.uint64),
        border_counts=np.empty(0, np.int32),
        borders=np.empty(0, np.int32),
        language=np.empty((0, 2), np.uint8) if languages else None,
        signature=np.empty((0, SIGNATURE_SIZE), np.uint32) if signatures else None,
    )
