"""Every document that is in no row, with its reason: what the build left out, and what the choice of documents did.

The store lists the former (``streams/<name>/dropped.jsonl``), each row index the latter; where a document came from is read
from the store, a thousand at a time, in the order of its shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.site import Site
from outgrow.storage import file_digest
from outgrow.streaming.document_table import DocumentTable, read_tables
from outgrow.streaming.documents import Documents
from outgrow.streaming.fetch import index_folder
from outgrow.streaming.parts import DROPPED
from outgrow.streaming.row_files import DroppedTable, dropped_file, read_dropped_table
from outgrow.streaming.rows import read_facts
from outgrow.streaming.selection import LANGUAGE, REASONS, TOO_LONG, TOO_LONG_TEXT, TOO_SHORT, Split
from outgrow.streaming.sources.document import DropReason
from outgrow.streaming.tiers.on_demand import Dataset, open_dataset

SHOWN_CHARS = 2000
"""As much of a quarantined document is shown."""

_AT_ONCE = 1000
"""Documents whose origins are looked up together; twins lie anywhere, and are read in the order of their shards."""
Place: TypeAlias = tuple[str, Split, int]


@dataclass(frozen=True, kw_only=True)
class DroppedLine:
    """One document that is in no row.

    ``split`` is empty where the build left it out, before it belonged to either. ``detail`` says more than the reason, such as
    ``like books/a.txt#12``. ``content`` is what a quarantined document held, at most 64 KiB of it.
    """

    source: str
    stream: str
    split: Literal["", "train", "validation"]
    reason: str
    detail: str = ""
    content: str = ""


def dropped(site: Site, card: DatasetCard, stream: str | None = None, reason: str | None = None) -> Iterator[DroppedLine]:
    """All documents in no row, or those of one stream or one reason: stream after stream, those of the build first.

    Of a dataset with several row indexes, the later ones add what is too long for their rows. Raises ``DataError`` for a stream
    or reason that cannot be, and where no place has the dataset; ``IntegrityError`` where a byte of it differs.
    """
    names = [own.name for own in card.streams]
    if stream is not None and stream not in names:
        raise DataError(f"the dataset has no stream '{stream}'", hint=f"its streams: {', '.join(names)}")
    reasons = (*get_args(DropReason), *REASONS[1:])
    if reason is not None and reason not in reasons:
        raise DataError(f"no document is dropped for '{reason}'", hint=f"reasons: {', '.join(reasons)}")
    return _opened(site, card, names if stream is None else [stream], reason)


def as_text(line: DroppedLine) -> str:
    """A line for a person; a quarantined document's content follows on lines of its own, its beginning if it is long."""
    where = f"{line.stream}.{line.split}" if line.split else line.stream
    text = f"{where}  {line.reason}  {line.source}" + (f": {line.detail}" if line.detail else "")
    shown = line.content[:SHOWN_CHARS]
    lines = [_printable(text), *(f"    | {_printable(own)}" for own in shown.splitlines())]
    if len(line.content) > len(shown):
        lines.append(f"    ... {len(line.content) - len(shown):,} characters more")
    return "\n".join(lines)


def _opened(site: Site, card: DatasetCard, names: Sequence[str], reason: str | None) -> Iterator[DroppedLine]:
    with open_dataset(site, card) as dataset:
        yield from dropped_lines(dataset, card, names, reason)


def dropped_lines(
    dataset: Dataset, card: DatasetCard, names: Sequence[str], reason: str | None = None
) -> Iterator[DroppedLine]:
    """``dropped`` of the streams ``names`` of a dataset that is open."""
    store, digests = dataset.store, dataset.digests
    origins = _Origins(dataset)
    for name in names:
        for line in _left_out(store, digests, name):
            if reason in (None, line.reason):
                yield line
        for number, index in enumerate(card.indexes):
            folder = index_folder(store, card, index)
            facts, own = read_facts(folder)
            streams = [split.name for split in facts.train]
            for split in ("validation", "train"):
                table = read_dropped_table(folder, name, split, own[dropped_file(name, split)])
                wanted = np.ones(len(table.document), np.bool_) if number == 0 else table.reason == TOO_LONG
                if reason is not None:
                    wanted &= table.reason == (REASONS.index(reason) if reason in REASONS else 0)
                chosen = _Chosen(name, split, streams, index.sequence_length, _only(table, wanted))
                yield from chosen.lines(read_tables(store, name, split, digests), origins)


def _left_out(store: Path, digests: Mapping[str, str], name: str) -> Iterator[DroppedLine]:
    """What the build left out of a stream."""
    key = f"streams/{name}/{DROPPED}"
    path = store / key
    if not path.is_file() or file_digest(path) != digests[key]:
        raise IntegrityError("the list of dropped documents is missing or differs from its digest", where=str(path))
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield DroppedLine(stream=name, split="", **json.loads(line))


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What the choice of documents, or the index, dropped of one split of one stream; ``streams`` are those of the index."""

    name: str
    split: Split
    streams: list[str]
    sequence_length: int
    table: DroppedTable

    def lines(self, tables: Iterator[DocumentTable], origins: _Origins) -> Iterator[DroppedLine]:
        """``tables`` are those of the split; they are read as far as a document needs them."""
        needing = np.flatnonzero(self.table.twin < 0)
        last = int(self.table.document[needing[-1]]) if len(needing) else -1
        first, start, documents = 0, 0, None
        while start < len(self.table.document):
            stop = len(self.table.document)
            if last >= self.table.document[start]:
                documents = next(tables)
                stop = int(np.searchsorted(self.table.document, first + len(documents)))
            for at in range(start, stop, _AT_ONCE):
                yield from self._some(range(at, min(at + _AT_ONCE, stop)), documents, first, origins)
            first, start = first + (0 if documents is None else len(documents)), stop

    def _some(self, places: range, documents: DocumentTable | None, first: int, origins: _Origins) -> Iterator[DroppedLine]:
        """Some places of the table; ``documents`` begins with number ``first``, and is not needed by those with a twin."""
        twins = {place: twin for place in places if (twin := self._twin(place)) is not None}
        own = {(self.name, self.split, int(self.table.document[place])) for place in places}
        sources = origins.read(own | {*twins.values()})
        for place in places:
            number = int(self.table.document[place])
            if place in twins:
                detail = f"like {sources[twins[place]]}" + (" (held out)" if twins[place][1] == "validation" else "")
            else:
                assert documents is not None, "a document without a twin lies in the table that was read for it"
                detail = _detail(int(self.table.reason[place]), documents, number - first, self.sequence_length)
            yield DroppedLine(
                source=sources[self.name, self.split, number],
                stream=self.name,
                split=self.split,
                reason=REASONS[self.table.reason[place]],
                detail=detail,
            )

    def _twin(self, place: int) -> Place | None:
        if self.table.twin[place] < 0:
            return None
        split: Split = "validation" if self.table.twin_validation[place] else "train"
        return self.streams[self.table.twin_stream[place]], split, int(self.table.twin[place])


@dataclass(frozen=True, eq=False)
class _Origins:
    """Where documents came from, read from the store."""

    dataset: Dataset
    _open: dict[tuple[str, Split], Documents] = field(default_factory=dict)

    def read(self, places: set[Place]) -> dict[Place, str]:
        return {place: self._documents(place[0], place[1]).source(place[2]) for place in sorted(places)}

    def _documents(self, name: str, split: Split) -> Documents:
        if (name, split) not in self._open:
            self._open[name, split] = self.dataset.documents(name, split, open_shards=2)
        return self._open[name, split]


def _detail(reason: int, documents: DocumentTable, row: int, sequence_length: int) -> str:
    if reason in (TOO_SHORT, TOO_LONG_TEXT):
        return f"{documents.chars[row]:,} characters"
    if reason == TOO_LONG:
        return f"{documents.lengths[row]:,} tokens; a row has {sequence_length:,}"
    if reason == LANGUAGE and documents.language is not None:
        return f"its language is {bytes(documents.language[row]).decode('ascii').strip(chr(0)) or 'not known'}"
    return ""


def _only(table: DroppedTable, wanted: npt.NDArray[np.bool_]) -> DroppedTable:
    return DroppedTable(
        document=table.document[wanted],
        reason=table.reason[wanted],
        twin_stream=table.twin_stream[wanted],
        twin_validation=table.twin_validation[wanted],
        twin=table.twin[wanted],
    )


def _printable(text: str) -> str:
    """The text on one line, without what would steer a terminal."""
    return "".join(char if char.isprintable() or char == "\t" else repr(char)[1:-1] for char in text)
