"""The row index of a token store: which tokens of which documents make up each row. No token is read.

All rows of a stream and split lie in *windows* of neighbouring shards. The documents of a window are shuffled (or stay in their
order) and become rows by themselves, so reading rows in order touches few shards at a time, and a window is made, kept and read
without the others. Each token of a document that is used lies in exactly one row. Another length, window, seed or choice of
documents is another index, not another store.

What a row predicts. The target of a position is the next token of the same document, also where the cut falls between the two:
the last position of a row then predicts the first token of the next row. So every token but the first of each document is
predicted exactly once, and the last token of a document predicts nothing. The two answers of a preference pair are a document
each in this respect.

``index.json`` is the manifest: counts, fingerprints and the sha256 of every file; ``row_files`` says what else there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.contracts import Record
from outgrow.errors import IntegrityError
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, read_manifest
from outgrow.streaming.row_files import WindowReader, read_window_table, rows_file, windows_file
from outgrow.streaming.row_windows import Span, Window
from outgrow.streaming.selection import Split

Int64: TypeAlias = npt.NDArray[np.int64]

_OPEN_WINDOWS = 2
"""Decoded windows of a stream that stay in memory: the one that is read, and its neighbour in the order of reading."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts(Record):
    """Counts of one split of one stream.

    ``documents`` and ``tokens`` are what lies in rows; ``dropped`` counts the documents that do not, by reason.
    ``fewest_rows`` is a lower bound of ``rows``, the best we know, window by window. Of the ``cuts`` between the rows of a
    window, ``cuts_at_borders`` lie between documents or at the end of a sentence or turn. ``sequential`` where rows are in the
    order of the source; ``pairs`` where documents are preference pairs.
    """

    name: str
    documents: int
    tokens: int
    rows: int
    fewest_rows: int
    cuts: int
    cuts_at_borders: int
    sequential: bool
    pairs: bool
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class IndexFacts(Record):
    """What a row index holds; streams are in the order of their names, which numbers the rows."""

    fingerprint: str
    store_fingerprint: str
    sequence_length: int
    window_shards: int
    seed: int
    train: tuple[SplitFacts, ...]
    validation: tuple[SplitFacts, ...]

    @property
    def rows(self) -> int:
        """Rows of the training split."""
        return sum(split.rows for split in self.train)

    @property
    def tokens(self) -> int:
        """Tokens of the training split."""
        return sum(split.tokens for split in self.train)

    @property
    def fill(self) -> float:
        """Share of the training rows' positions that hold a token; 0 where there is no row."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamRows:
    """The rows of one split of one stream, numbered from 0.

    ``window_rows`` int64 [windows + 1] is the first row of each window; ``read`` gives a window, and few are kept.
    """

    name: str
    sequence_length: int
    window_rows: Int64
    read: Callable[[int], Window]
    sequential: bool = False
    pairs: bool = False
    _open: OrderedDict[int, Window] = field(default_factory=OrderedDict, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return int(self.window_rows[-1])

    def window(self, number: int) -> Window:
        """One window. Raises ``IntegrityError`` where its bytes differ from their digest."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        window = self._open[number] = self.read(number)
        if len(self._open) > _OPEN_WINDOWS:
            self._open.popitem(last=False)
        return window

    def locate(self, row: int) -> tuple[Window, int]:
        """The window of a row, and its number there."""
        number = int(np.searchsorted(self.window_rows, row, "right")) - 1
        return self.window(number), row - int(self.window_rows[number])

    def spans(self, row: int) -> list[Span]:
        """What lies in a row, in order."""
        window, own = self.locate(row)
        return window.spans(own)

    def weight(self, row: int) -> float:
        """Sum of the loss weights of a row's targets."""
        window, own = self.locate(row)
        return float(window.weights[own])

    def tokens(self, row: int) -> int:
        """Tokens of a row; at most the sequence length."""
        window, own = self.locate(row)
        return int(window.cuts[own + 1] - window.cuts[own])

    def sums(self, rows: Int64) -> tuple[float, int]:
        """Loss weights and tokens of the rows together."""
        numbers = np.searchsorted(self.window_rows, rows, "right") - 1
        weight, tokens = 0.0, 0
        for number in np.unique(numbers).tolist():
            window, own = self.window(number), rows[numbers == number] - self.window_rows[number]
            weight += float(window.weights[own].sum())
            tokens += int((window.cuts[own + 1] - window.cuts[own]).sum())
        return weight, tokens


@dataclass(frozen=True, eq=False)
class RowIndex:
    """An opened row index. Rows are numbered over the streams in order, training and validation each from 0."""

    facts: IndexFacts
    train: tuple[StreamRows, ...]
    validation: tuple[StreamRows, ...]

    @classmethod
    def open(cls, folder: Path, lost: Mapping[str, Sequence[range]] | None = None) -> Self:
        """Reads the tables of windows alone; rows are read, and checked, when they are asked for.

        ``lost`` has training documents by stream, see ``lost_shards``: a row with a token of one is read as empty, under its
        own number. ``facts`` and the numbers of rows are those of the whole index all the same.

        Raises ``DataError`` where the index was never committed, ``IntegrityError`` where a byte differs.
        """
        facts, digests = read_facts(folder)

        def streams(split: Split, own: tuple[SplitFacts, ...], lost: Mapping[str, Sequence[range]]) -> tuple[StreamRows, ...]:
            return tuple(
                _open(folder, digests, split, stream, facts.sequence_length, lost.get(stream.name, ())) for stream in own
            )

        return cls(facts, streams("train", facts.train, lost or {}), streams("validation", facts.validation, {}))

    def streams(self, split: Split) -> tuple[StreamRows, ...]:
        return self.train if split == "train" else self.validation

    def first_rows(self, split: Split) -> Int64:
        """Number of the first row of each stream, and the count of all rows, int64 [streams + 1]."""
        return np.cumsum([0, *(stream.num_rows for stream in self.streams(split))], dtype=np.int64)


def read_facts(folder: Path) -> tuple[IndexFacts, dict[str, str]]:
    """The facts of a committed index, and the sha256 of its files.

    Raises ``DataError`` where it was never committed, ``IntegrityError`` where its manifest differs or is another one's.
    """
    manifest = read_manifest(folder, INDEX_MANIFEST)
    try:
        facts = IndexFacts.from_dict({name: manifest[name] for name in IndexFacts.__dataclass_fields__})
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"this is no manifest of a row index: {error}", where=str(folder / INDEX_MANIFEST)) from None
    return facts, manifest[FILES]


def _open(
    folder: Path, digests: Mapping[str, str], split: Split, facts: SplitFacts, sequence_length: int, lost: Sequence[range]
) -> StreamRows:
    table = read_window_table(folder, facts.name, split, digests[windows_file(facts.name, split)])
    read = WindowReader(folder / rows_file(facts.name, split), table)
    return StreamRows(
        name=facts.name,
        sequence_length=sequence_length,
        window_rows=table.rows,
        read=(lambda number: read(number).without(lost)) if lost else read,
        sequential=facts.sequential,
        pairs=facts.pairs,
    )
