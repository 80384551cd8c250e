"""Rows of a dataset as a person reads them: decoded, with the boundaries of documents, and what of them is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby, islice

from outgrow.contracts import DatasetCard
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.documents import Documents
from outgrow.streaming.fetch import index_folder
from outgrow.streaming.packing import Part, parts
from outgrow.streaming.rows import RowIndex, StreamRows
from outgrow.streaming.sampler import Sampler
from outgrow.streaming.store import TOKENIZER
from outgrow.streaming.tiers.on_demand import Dataset, open_dataset
from outgrow.streaming.tokenizer import TextTokenizer

_OPEN_SHARDS = 8
"""Shards of a stream that stay mapped."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring tokens that are learned with one loss weight; 0: they are not learned."""

    text: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of one document in a row: tokens ``start`` to ``start + length`` of its ``document_tokens``.

    ``runs`` is empty where all of the document is learned, with weight 1. ``answer`` is ``chosen`` or ``rejected`` with the
    number of the preference pair in the row, empty for any other document.
    """

    source: str
    start: int
    length: int
    document_tokens: int
    answer: str
    text: str
    runs: tuple[Run, ...]

    @property
    def marked(self) -> str:
        """The text with what is learned between brackets, its weight before it where that is not 1; plain where all of the
        document is learned."""
        return "".join(f"⟦{_prefix(run.weight)}{run.text}⟧" if run.weight else run.text for run in self.runs) or self.text


@dataclass(frozen=True, kw_only=True)
class ReadableRow:
    """A training row: the optimizer step that it comes in, its number in the index of that length of rows, its stream, and the
    segments in it."""

    step: int
    row_id: int
    sequence_length: int
    stream: str
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


def first_rows(recipe: Recipe, site: Site, card: DatasetCard, num_rows: int, *, step: int = 0) -> Iterator[ReadableRow]:
    """The first ``num_rows`` rows that training reads from optimizer step ``step`` on, decoded with the dataset's tokenizer.

    Raises ``DataError`` where no place has the dataset, ``IntegrityError`` where a byte of it differs.
    """
    with open_dataset(site, card) as dataset:
        indexes = [RowIndex.open(index_folder(dataset.store, card, index)) for index in card.indexes]
        sampler = Sampler(indexes, Mix.of(recipe, card), recipe.run.seed)
        reader = _Reader(dataset, indexes)
        rows = ((at, row_id) for at in count(step) for row_id in sampler.row_ids(at))
        for at, row_id in islice(rows, num_rows):
            yield reader.read(indexes[sampler.phase(at).index], at, row_id)


class _Reader:
    """Decodes rows of indexes of one store."""

    def __init__(self, dataset: Dataset, indexes: list[RowIndex]) -> None:
        self._tokenizer = TextTokenizer(dataset.store / TOKENIZER)
        self._documents = {
            stream.name: dataset.documents(stream.name, "train", open_shards=_OPEN_SHARDS) for stream in indexes[0].train
        }

    def read(self, index: RowIndex, step: int, row_id: int) -> ReadableRow:
        firsts = index.first_rows("train")
        number = int(firsts.searchsorted(row_id, "right")) - 1
        stream = index.train[number]
        return ReadableRow(
            step=step,
            row_id=row_id,
            sequence_length=stream.sequence_length,
            stream=stream.name,
            segments=tuple(self._segments(stream, row_id - int(firsts[number]))),
        )

    def _segments(self, stream: StreamRows, row: int) -> Iterator[Segment]:
        documents, pair = self._documents[stream.name], 0
        for span in stream.spans(row):
            tokens = documents.tokens(span.document)
            answers = documents.spans(span.document) if stream.pairs else None
            for part in parts(span, len(tokens), answers):
                yield Segment(
                    source=documents.source(span.document),
                    start=part.start,
                    length=part.stop - part.start,
                    document_tokens=len(tokens),
                    answer=f"{('chosen', 'rejected')[part.pair]} {pair}" if part.pair >= 0 else "",
                    text=self._tokenizer.decode(tokens[part.start : part.stop]),
                    runs=tuple(self._runs(documents, span.document, part)),
                )
            pair += answers is not None

    def _runs(self, documents: Documents, document: int, part: Part) -> Iterator[Run]:
        tokens, weights = documents.tokens(document), documents.weights(document)
        if weights is None:
            return
        for weight, places in groupby(range(part.start, part.stop), key=lambda place: float(weights[place])):
            run = list(places)
            yield Run(text=self._tokenizer.decode(tokens[run[0] : run[-1] + 1]), weight=weight)


def _prefix(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g}: "
