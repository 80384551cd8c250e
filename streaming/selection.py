"""Which documents of a store are used: those that pass the filters and are not like another; each dropped one has a reason.

A pure function of the store's document tables and the recipe. Documents are taken in one order: held-out ones first, stream
after stream as in the recipe, then training ones likewise, each stream in the order of its store; of documents that are alike
the first is kept. What a filter drops is no twin of anything. A training document that equals one of a stream for validation
goes even where no duplicates are to be removed: a general set that is trained on measures nothing. (Within the other streams
equal documents are held out together anyway, for their digest decides.) Memory: 40 bytes a document, one table of documents,
and 200 MB; signatures stay on disk and are read once for each band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.contracts import JsonDict
from outgrow.recipes.schema.data import Data
from outgrow.recipes.schema.streams import Filter
from outgrow.streaming import duplicates, languages
from outgrow.streaming.document_table import FOLDER, DocumentTable, read_tables
from outgrow.streaming.manifest import FILES, STORE_MANIFEST, read_manifest
from outgrow.streaming.twins import Bool, Comparable, Int64, Signatures, UInt64, exact_twins, near_twins

FORMAT = 1
"""Counts up when the same store and recipe would give another choice."""
REASONS = ("kept", "too_short", "too_long_text", "language", "duplicate", "near_duplicate", "like_validation", "too_long")
"""What becomes of a document, by code. ``too_long`` is what the row index drops for being longer than a row."""
KEPT, TOO_SHORT, TOO_LONG_TEXT, LANGUAGE, DUPLICATE, NEAR_DUPLICATE, LIKE_VALIDATION, TOO_LONG = range(len(REASONS))

Split: TypeAlias = Literal["train", "validation"]

_SPLITS: tuple[Split, ...] = ("validation", "train")
"""In the order of precedence: a held-out document is kept, and the training ones like it go."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """What becomes of the N documents of one split of one stream.

    reason           uint8 [N]   place in ``REASONS``; 0 where it is kept
    twin_stream      int16 [N]   stream of the document it is like, a place in ``Selection.names``; -1 where there is none
    twin_validation  bool [N]    whether that document is a held-out one
    twin             int64 [N]   number of that document in its stream and split; -1 where there is none. It is kept.
    """

    reason: npt.NDArray[np.uint8]
    twin_stream: npt.NDArray[np.int16]
    twin_validation: Bool
    twin: Int64

    def __len__(self) -> int:
        return len(self.reason)

    @property
    def kept(self) -> Bool:
        kept: Bool = self.reason == KEPT
        return kept


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """The choice of every stream and split; ``names`` are the streams in the order of the recipe."""

    names: tuple[str, ...]
    choices: Mapping[tuple[str, Split], Choice]


def select(store: Path, data: Data) -> Selection:
    """Choose among all documents of a committed store.

    Raises ``DataError`` where the store was never finished, ``IntegrityError`` where a table differs from its digest.
    """
    names = tuple(stream.name for stream in data.streams)
    filters = [stream.filter for stream in data.streams]
    documents, keys = _read(store, names, filters, read_manifest(store, STORE_MANIFEST)[FILES])
    twin = np.full(len(documents.reason), -1, np.int64)
    comparable: Comparable = documents.comparable if data.duplicates.across == "stream" else _always
    general = np.array([stream.use == "validation" for stream in data.streams])
    if data.duplicates.remove != "none" or general.any():
        used: Bool = documents.reason == KEPT
        if data.duplicates.remove == "none":
            comparable, used = documents.leaking(general), _may_leak(keys, used, *documents.watched_and_trained(general))
        twin = exact_twins(keys, used, comparable)
        _give_reasons(documents, twin, np.flatnonzero(twin >= 0), DUPLICATE)
    del keys
    if data.duplicates.remove == "near":
        _drop_near(documents, twin, comparable, data.duplicates.similarity)
    return documents.selection(twin)


def selection_identity(data: Data) -> JsonDict:
    """All of a recipe's data section that decides the choice of a given store; streams in their order where that counts."""
    given = data.duplicates
    identity: JsonDict = {
        "format": FORMAT,
        "filters": {s.name: s.filter.model_dump(mode="json") for s in data.streams if s.filter != Filter()},
        "remove": given.remove,
    }
    if given.remove != "none":
        identity |= {"across": given.across, "order": [stream.name for stream in data.streams]}
    if given.remove == "near":
        identity["similarity"] = given.similarity
    return identity


def needs_languages(data: Data) -> bool:
    """Whether the build must find out the language of every document."""
    return any(stream.filter.languages for stream in data.streams)


def needs_signatures(data: Data) -> bool:
    """Whether the build must make a signature of every document."""
    return data.duplicates.remove == "near"


def columns_identity(data: Data) -> JsonDict:
    """What of a recipe decides the columns that ``languages`` and ``duplicates`` add to a store's document tables."""
    identity: JsonDict = {}
    if needs_languages(data):
        identity["languages"] = languages.FORMAT
    if needs_signatures(data):
        identity["signatures"] = duplicates.FORMAT
    return identity


@dataclass(frozen=True, eq=False, kw_only=True)
class _Documents:
    """All documents in the order of precedence, as sections: split after split, and in it stream after stream.

    reason   uint8 [N]
    signed   bool [N], whether it has a signature to compare
    starts   int64 [sections + 1], first document of each section
    files    the tables in order; ``counts`` is how many documents each has
    """

    names: tuple[str, ...]
    reason: npt.NDArray[np.uint8]
    signed: Bool
    starts: Int64
    files: Sequence[Path]
    counts: Sequence[int]

    def section(self, documents: Int64) -> Int64:
        return np.searchsorted(self.starts, documents, "right") - 1

    def comparable(self, a: Int64, b: Int64) -> Bool:
        """Whether documents are of one stream, or the earlier one is held out and the other is not."""
        streams = len(self.names)
        first, second = self.section(a), self.section(b)
        same: Bool = first % streams == second % streams
        return same | ((first < streams) & (second >= streams))

    def leaking(self, general: Bool) -> Comparable:
        """Whether the earlier document is of a stream for validation, as ``general`` [streams] says, and the other is trained
        on."""
        streams = len(self.names)
        watched = np.concatenate([general, np.zeros(streams, np.bool_)])

        def leaks(a: Int64, b: Int64) -> Bool:
            found: Bool = watched[self.section(a)] & (self.section(b) >= streams)
            return found

        return leaks

    def watched_and_trained(self, general: Bool) -> tuple[Bool, Bool]:
        """Which documents, bool [N] each, are of a stream for validation, and which are trained on."""
        rest = np.zeros(len(self.names), np.bool_)
        counts = np.diff(self.starts)
        return np.repeat(np.concatenate([general, rest]), counts), np.repeat(np.concatenate([rest, ~rest]), counts)

    def selection(self, twin: Int64) -> Selection:
        streams = len(self.names)
        choices: dict[tuple[str, Split], Choice] = {}
        for number, (start, stop) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)):
            own = twin[start:stop]
            section = np.where(own >= 0, self.section(own), -1)
            choices[self.names[number % streams], _SPLITS[number // streams]] = Choice(
                reason=self.reason[start:stop],
                twin_stream=np.where(own >= 0, section % streams, -1).astype(np.int16),
                twin_validation=(own >= 0) & (section < streams),
                twin=np.where(own >= 0, own - self.starts[section], -1),
            )
        return Selection(names=self.names, choices=choices)


def _may_leak(keys: tuple[UInt64, UInt64], used: Bool, watched: Bool, trained: Bool) -> Bool:
    """Of the ``used`` documents the first of each equal ones that are ``watched``, and those ``trained`` on that may equal one.

    Copies among which none is watched would be compared each with all the others, and a text may be there a million times.
    """
    found = np.flatnonzero(used & watched)
    pairs, first = np.unique(np.stack([half[found] for half in keys], axis=1), axis=0, return_index=True)
    chosen = np.zeros(len(used), np.bool_)
    if len(found):
        place = np.minimum(np.searchsorted(pairs[:, 0], keys[0]), len(pairs) - 1)
        chosen = used & trained & (pairs[place, 0] == keys[0])
        chosen[found[first]] = True
    return chosen


def _read(
    store: Path, names: Sequence[str], filters: Sequence[Filter], digests: Mapping[str, str]
) -> tuple[_Documents, tuple[UInt64, UInt64]]:
    """The tables read once: what the filters drop, and the two halves of each document's key, uint64 [N] each."""
    reasons: list[npt.NDArray[np.uint8]] = []
    signed: list[Bool] = []
    halves: tuple[list[UInt64], list[UInt64]] = ([], [])
    starts, counts, files = [0], [], []
    for split in _SPLITS:
        for name, rule in zip(names, filters, strict=True):
            below = f"streams/{name}/{split}/{FOLDER}/"
            files += [store / key for key in sorted(digests) if key.startswith(below)]
            for table in read_tables(store, name, split, digests):
                reasons.append(_filtered(table, rule))
                signed.append(np.zeros(len(table), np.bool_) if table.signature is None else table.signature.any(axis=1))
                counts.append(len(table))
                for half, column in zip(halves, table.content.T, strict=True):
                    half.append(column.copy())
            starts.append(sum(counts))
    documents = _Documents(
        names=tuple(names),
        reason=np.concatenate([np.empty(0, np.uint8), *reasons]),
        signed=np.concatenate([np.empty(0, np.bool_), *signed]),
        starts=np.array(starts, np.int64),
        files=files,
        counts=counts,
    )
    return documents, (_joined(halves[0]), _joined(halves[1]))


def _filtered(table: DocumentTable, rule: Filter) -> npt.NDArray[np.uint8]:
    """What the filter of a stream makes of the documents of one table; the first reason that holds is given."""
    reason = np.full(len(table), KEPT, np.uint8)
    if rule.languages:
        assert table.language is not None, "the store was built without languages"
        wanted = np.array([list(code.encode("ascii")) for code in rule.languages], np.uint8)
        reason[~(table.language[:, None, :] == wanted).all(axis=2).any(axis=1)] = LANGUAGE
    if rule.max_chars:
        reason[table.chars > rule.max_chars] = TOO_LONG_TEXT
    reason[table.chars < rule.min_chars] = TOO_SHORT
    return reason


def _drop_near(documents: _Documents, twin: Int64, comparable: Comparable, similarity: float) -> None:
    signatures = Signatures(documents.files, documents.counts)
    near = near_twins(signatures, (documents.reason == KEPT) & documents.signed, comparable, similarity)
    dropped = np.flatnonzero(near >= 0)
    twin[dropped] = near[dropped]
    _give_reasons(documents, twin, dropped, NEAR_DUPLICATE)
    # What equals a document that now goes too is like the same twin; so every twin that is named is kept.
    equal = np.flatnonzero((twin >= 0) & (near < 0))
    moved = equal[near[twin[equal]] >= 0]
    twin[moved] = near[twin[moved]]
    _give_reasons(documents, twin, moved, NEAR_DUPLICATE)


def _give_reasons(documents: _Documents, twin: Int64, dropped: Int64, reason: int) -> None:
    streams = len(documents.names)
    leaks = (documents.section(twin[dropped]) < streams) & (documents.section(dropped) >= streams)
    documents.reason[dropped] = np.where(leaks, LIKE_VALIDATION, reason)


def _always(a: Int64, b: Int64) -> Bool:
    return np.ones(len(a), np.bool_)


def _joined(parts: Sequence[UInt64]) -> UInt64:
    return np.concatenate([np.empty(0, np.uint64), *parts])
