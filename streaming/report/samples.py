"""What a report says of documents that it reads: languages, tokens a word, and texts with what is learned of them marked.

Some documents of a stream stand for all: they lie in a few shards spread evenly over it, so that a sample of a terabyte reads
and checks eight shards of each stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.streaming.documents import Documents
from outgrow.streaming.languages import detect
from outgrow.streaming.mds_index import read_our_shards
from outgrow.streaming.report.facts import Opened
from outgrow.streaming.selection import Split
from outgrow.streaming.shards import SHARDS
from outgrow.streaming.tokenizer import TextTokenizer

DOCUMENTS = 500
"""Documents of a stream that are read at most."""
SHARDS_READ = 8
"""Shards that they lie in at most."""
TOKENS = 2000
"""Tokens of a document that are read, from its beginning."""
SHOWN = 3
"""Documents of a stream that are shown."""
SHOWN_TOKENS = 400
"""Tokens of them that are shown; of either answer of a preference pair."""

_PROSE = 0.85
"""Share of letters and spaces from which a text counts as prose; code, tables and markup have less."""
_BEGINNING = 140


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens that are learned with one loss weight; 0: they are not learned."""

    text: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A document as it is shown: ``parts`` is one, or the chosen and the rejected answer of a preference pair, each with what
    it is called. ``cut`` where there is more of it."""

    source: str
    tokens: int
    parts: tuple[tuple[str, tuple[Piece, ...]], ...]
    cut: bool


@dataclass(frozen=True, kw_only=True)
class LanguageFigures:
    """The sampled documents of one language in one stream. Tokens are those of text alone, no special token among them;
    ``prose_`` counts what is mainly words, for tokens a word."""

    documents: int = 0
    chars: int = 0
    tokens: int = 0
    prose_words: int = 0
    prose_tokens: int = 0

    def __add__(self, other: LanguageFigures) -> LanguageFigures:
        return LanguageFigures(**{name.name: getattr(self, name.name) + getattr(other, name.name) for name in fields(self)})


@dataclass(frozen=True, kw_only=True)
class StreamSample:
    """``languages`` by ISO 639-1 code, "" where it is not known; the largest first."""

    name: str
    documents: int
    languages: dict[str, LanguageFigures]
    shown: tuple[Shown, ...]


class Reader:
    """Decodes documents of a dataset with its own tokenizer."""

    def __init__(self, opened: Opened, tokenizer: TextTokenizer) -> None:
        self._opened = opened
        self._tokenizer = tokenizer
        self._added = np.array(sorted(tokenizer.added_tokens), np.int64)
        self._open: dict[tuple[str, Split], Documents] = {}

    def documents(self, name: str, split: Split) -> Documents:
        if (name, split) not in self._open:
            self._open[name, split] = self._opened.dataset.documents(name, split, open_shards=2)
        return self._open[name, split]

    def describe(self, name: str, split: Split, document: int) -> tuple[str, str]:
        """Where a document came from, and the beginning of its text."""
        documents = self.documents(name, split)
        text, _ = self.text(documents.tokens(document)[:_BEGINNING])
        return documents.source(document), text[:_BEGINNING]

    def text(self, tokens: npt.NDArray[Any]) -> tuple[str, int]:
        """The text of tokens without special ones, and how many are left."""
        plain = tokens[~np.isin(tokens, self._added)]
        return self._tokenizer.decode(plain), len(plain)

    def show(self, name: str, document: int) -> Shown:
        """A training document with what is learned of it."""
        documents = self.documents(name, "train")
        tokens, weights, spans = documents.tokens(document), documents.weights(document), documents.spans(document)
        own = np.ones(len(tokens), np.float32) if weights is None else weights
        places = [("", 0, len(tokens))]
        if spans is not None:
            places = [(label, *span) for label, span in zip(("chosen", "rejected"), spans.tolist(), strict=True)]
        return Shown(
            source=documents.source(document),
            tokens=len(tokens),
            parts=tuple(
                (label, tuple(self._pieces(tokens, own, start, min(stop, start + SHOWN_TOKENS))))
                for label, start, stop in places
            ),
            cut=any(stop - start > SHOWN_TOKENS for _, start, stop in places),
        )

    def _pieces(self, tokens: npt.NDArray[Any], weights: npt.NDArray[np.float32], start: int, stop: int) -> Iterator[Piece]:
        for weight, places in groupby(range(start, stop), key=lambda at: float(weights[at])):
            run = list(places)
            yield Piece(text=self._tokenizer.decode(tokens[run[0] : run[-1] + 1]), weight=weight)


def sample(reader: Reader, opened: Opened, name: str) -> StreamSample:
    """Read some of the documents of a stream that are trained on."""
    chosen = _spread(opened, name)
    documents = reader.documents(name, "train")
    found: dict[str, LanguageFigures] = {}
    for number in chosen.tolist():
        text, tokens = reader.text(documents.tokens(number)[:TOKENS])
        language = detect([text])[0]
        found[language] = found.get(language, LanguageFigures()) + _figures(text, tokens)
    shown = chosen[(np.arange(min(SHOWN, len(chosen))) * len(chosen)) // max(1, min(SHOWN, len(chosen)))]
    return StreamSample(
        name=name,
        documents=len(chosen),
        languages=dict(sorted(found.items(), key=lambda item: (-item[1].documents, item[0]))),
        shown=tuple(reader.show(name, number) for number in shown.tolist()),
    )


def _spread(opened: Opened, name: str) -> npt.NDArray[np.int64]:
    """Numbers of documents that are trained on, spread over a few shards that are spread over the stream; ascending."""
    below = f"streams/{name}/train"
    ends = read_our_shards(opened.store / below, opened.digests[f"{below}/{SHARDS}"]).ends
    count = min(SHARDS_READ, len(ends))
    shards = (np.arange(count) * len(ends) + len(ends) // 2) // max(1, count)
    starts = np.concatenate([[0], ends])[:-1]
    numbers = np.concatenate([np.empty(0, np.int64), *(np.arange(starts[own], ends[own]) for own in shards.tolist())])
    used = np.setdiff1d(numbers, opened.dropped[name, "train"].document, assume_unique=True)
    wanted = min(DOCUMENTS, len(used))
    spread: npt.NDArray[np.int64] = used[(np.arange(wanted) * len(used)) // max(1, wanted)]
    return spread


def _figures(text: str, tokens: int) -> LanguageFigures:
    is_prose = sum(char.isalpha() or char.isspace() for char in text) >= _PROSE * max(1, len(text))
    return LanguageFigures(
        documents=1,
        chars=len(text),
        tokens=tokens,
        prose_words=len(text.split()) if is_prose else 0,
        prose_tokens=tokens if is_prose else 0,
    )
