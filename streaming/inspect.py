"""Rows of a dataset as a person reads them: decoded, with the boundaries of the documents in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from outgrow.contracts import DatasetCard
from outgrow.recipes.schema.site import Site
from outgrow.streaming.documents import Documents
from outgrow.streaming.fetch import local_dataset
from outgrow.streaming.manifest import FILES, read_manifest
from outgrow.streaming.rows import RowIndex, Span
from outgrow.streaming.sampler import epoch_order
from outgrow.streaming.store import MANIFEST, TOKENIZER
from outgrow.streaming.tokenizer import TextTokenizer

_OPEN_SHARDS = 8
"""Shards of a stream that stay mapped."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of one document in a row: tokens ``start`` to ``start + length`` of its ``document_tokens``."""

    source: str
    start: int
    length: int
    document_tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class ReadableRow:
    """A training row: its number in the index, its stream, and the segments in it."""

    row_id: int
    stream: str
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


def first_rows(site: Site, card: DatasetCard, num_rows: int) -> Iterator[ReadableRow]:
    """The first ``num_rows`` rows that training reads, decoded with the dataset's own tokenizer.

    Raises ``DataError`` where the dataset is not on this node, ``IntegrityError`` where a byte of it differs.
    """
    store = local_dataset(site, card)
    index = RowIndex.open(store / PurePosixPath(card.index).name)
    digests = read_manifest(store, MANIFEST)[FILES]
    tokenizer = TextTokenizer(store / TOKENIZER)
    firsts = index.first_rows("train")
    sources = [Documents(store, stream.name, "train", digests, open_shards=_OPEN_SHARDS) for stream in index.train]
    for row_id in epoch_order(index, index.facts.seed, 0)[:num_rows].tolist():
        number = int(firsts.searchsorted(row_id, "right")) - 1
        stream, documents = index.train[number], sources[number]
        segments = [_segment(documents, span, tokenizer) for span in stream.spans(row_id - int(firsts[number]))]
        yield ReadableRow(row_id=row_id, stream=stream.name, segments=tuple(segments))


def _segment(documents: Documents, span: Span, tokenizer: TextTokenizer) -> Segment:
    tokens = documents.tokens(span.document)
    return Segment(
        source=documents.source(span.document),
        start=span.start,
        length=span.length,
        document_tokens=len(tokens),
        text=tokenizer.decode(tokens[span.start : span.start + span.length]),
    )
