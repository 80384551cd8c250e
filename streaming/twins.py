"""Which documents are like an earlier one: exact by 16-byte keys, near by bands of signatures; the first is kept. Pure numpy.

Documents are numbers 0 to N - 1 in the order of precedence. A document is dropped when an earlier one that is kept itself is
its twin, so a chain of likenesses does not collapse into its first link. What is kept, and which twin each dropped one names,
does not depend on how the documents are divided into parts.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.streaming.document_table import SIGNATURE_SIZE
from outgrow.streaming.duplicates import agreement, band_keys, bands, share_a_band

Int64: TypeAlias = npt.NDArray[np.int64]
UInt64: TypeAlias = npt.NDArray[np.uint64]
Bool: TypeAlias = npt.NDArray[np.bool_]
Comparable: TypeAlias = Callable[[Int64, Int64], Bool]
"""Whether each document of the second array may be dropped for the one beside it in the first, which is earlier."""

_SORTED_AT_ONCE = 2**22
"""Keys are sorted in shares of about this many, so that sorting takes 150 MB at most beside the keys."""
_COMPARED_AT_ONCE = 2**15
"""Pairs of signatures that are read and compared at once: 32 MB."""
_HELD = 2**16
"""Signatures that are held in memory while the groups of their documents are gone through: 32 MB."""
_OPEN_FILES = 64


def exact_twins(keys: tuple[UInt64, UInt64], used: Bool, comparable: Comparable) -> Int64:
    """The first equal document of each, int64 [N], -1 where there is none.

    ``keys`` are the two halves of the content's digest, uint64 [N] each; only documents that are ``used`` take part. Takes 8
    bytes a document, and those of the arguments.
    """
    twin = np.full(len(used), -1, np.int64)
    for members, groups in _groups(keys[0], used):
        # Equal first halves are nearly always equal keys, but 64 bits alone prove nothing.
        order = np.lexsort((members, keys[1][members], groups))
        members, groups = members[order], groups[order]
        groups = np.cumsum(_starts(groups) | _starts(keys[1][members]))
        for dropped, first in _dropped(members, groups, comparable):
            twin[dropped] = first
    return twin


def near_twins(signatures: Signatures, used: Bool, comparable: Comparable, similarity: float) -> Int64:
    """A document that each is like (estimated Jaccard similarity from ``similarity`` on), int64 [N] or -1.

    It is an earlier one that is kept; of several it need not be the first, but is the same however the signatures lie in files.
    Pairs are found by sharing a band of their signatures, band after band. A document dropped for one that an earlier one then
    drops too is taken up again in another round; each round settles at least the first document that is not settled, so it ends
    with those kept that comparing one after the other with those kept would keep. Takes some 30 bytes a document.
    """
    count, rows = bands(similarity)
    twin = np.full(len(used), -1, np.int64)
    alive, fresh = used.copy(), used.copy()

    def droppable(a: Int64, b: Int64) -> Bool:
        # Of two that are not fresh, an earlier round has told already that they differ.
        return comparable(a, b) & (fresh[a] | fresh[b])

    while fresh.any():
        for band in range(count):
            keys = signatures.keys(band * rows, rows)
            for members, groups in _groups(keys, alive):
                chosen = _with_fresh(members, groups, fresh)
                for dropped, first in _dropped(*chosen, droppable, signatures, similarity):
                    twin[dropped] = first
                    alive[dropped] = False
        fresh = np.zeros_like(fresh)
        lost = np.flatnonzero(twin >= 0)
        lost = lost[~alive[twin[lost]]]
        # In a large cluster nearly all are like the one that their twin was dropped for, and need no other round.
        kept = _last(twin, lost)
        like = comparable(kept, lost) & signatures.alike(kept, lost, similarity)
        twin[lost] = np.where(like, kept, -1)
        fresh[lost[~like]] = True
        alive |= fresh
    return twin


def _last(twin: Int64, documents: Int64) -> Int64:
    """Where the twins of twins end, int64 [n]."""
    found = twin[documents]
    while (further := twin[found] >= 0).any():
        found[further] = twin[found[further]]
    return found


class Signatures:
    """The MinHash signatures of documents in files, uint32 [N, 128] all together, read where they are needed.

    The files are safetensors whose bytes were checked; ``counts`` says how many documents each has. They stay on disk (mapped).
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self._files = files
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        self._open: OrderedDict[int, npt.NDArray[np.uint32]] = OrderedDict()

    def keys(self, first: int, rows: int) -> UInt64:
        """A number that is equal where ``rows`` numbers from the ``first`` are equal, uint64 [N]."""
        keys = np.empty(self._starts[-1], np.uint64)
        for number, (start, stop) in enumerate(zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)):
            keys[start:stop] = band_keys(np.ascontiguousarray(self._mapped(number)[:, first : first + rows]))
        return keys

    def alike(self, a: Int64, b: Int64, similarity: float) -> Bool:
        """Whether the documents of each pair agree in that share of their numbers and share a band, bool [n]."""
        found = np.empty(len(a), np.bool_)
        for start in range(0, len(a), _COMPARED_AT_ONCE):
            part = slice(start, start + _COMPARED_AT_ONCE)
            one, other = self.rows(a[part]), self.rows(b[part])
            found[part] = (agreement(one, other) >= similarity * SIGNATURE_SIZE) & share_a_band(one, other, similarity)
        return found

    def agree(self, members: Int64, held: npt.NDArray[np.uint32] | None, a: Int64, b: Int64) -> Int64:
        """In how many numbers pairs of ``members``, given by places, agree, int64 [n]; ``held``: their signatures, if read."""
        counts = np.empty(len(a), np.int64)
        for start in range(0, len(a), _COMPARED_AT_ONCE):
            part = slice(start, start + _COMPARED_AT_ONCE)
            one, other = a[part], b[part]
            if held is None:
                counts[part] = agreement(self.rows(members[one]), self.rows(members[other]))
            else:
                counts[part] = agreement(held[one], held[other])
        return counts

    def rows(self, documents: Int64) -> npt.NDArray[np.uint32]:
        """Signatures of some documents, uint32 [n, 128]."""
        order = np.argsort(documents, kind="stable")
        found = np.empty((len(documents), SIGNATURE_SIZE), np.uint32)
        cuts = np.searchsorted(documents[order], self._starts)
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            places = order[cuts[number] : cuts[number + 1]]
            found[places] = self._mapped(number)[documents[places] - self._starts[number]]
        return found

    def _mapped(self, number: int) -> npt.NDArray[np.uint32]:
        if number not in self._open:
            self._open[number] = _map_column(self._files[number], "signature")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _map_column(path: Path, name: str) -> npt.NDArray[np.uint32]:
    """One column of a safetensors file, mapped; the format is a uint64 size, a JSON header of that size, and the arrays."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        column = json.loads(file.read(size))[name]
    start = 8 + size + column["data_offsets"][0]
    shape = tuple(column["shape"])
    if 0 in shape:  # nothing can be mapped of nothing
        return np.empty(shape, np.uint32)
    return np.memmap(path, np.uint32, "r", start, shape)


def _groups(keys: UInt64, used: Bool) -> Iterator[tuple[Int64, Int64]]:
    """Documents whose keys are equal, as (documents int64 [n], number of each one's group int64 [n]), in shares.

    Groups have two documents at least and lie one after the other; within a group documents ascend.
    """
    shares = 1 << max(0, (len(keys) - 1) // _SORTED_AT_ONCE).bit_length()
    width = np.uint64(64 - (shares.bit_length() - 1))
    for share in range(shares):
        chosen = used if shares == 1 else used & (keys >> width == share)
        members = np.flatnonzero(chosen)
        own = keys[members]
        order = np.argsort(own, kind="stable")
        starts = _starts(own[order])
        grouped = ~starts
        grouped[:-1] |= grouped[1:]
        if grouped.any():
            yield members[order[grouped]], np.cumsum(starts[grouped])


def _starts(values: npt.NDArray[np.int64 | np.uint64]) -> Bool:
    """Where a value differs from the one before it; the first always does."""
    starts = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts


def _with_fresh(members: Int64, groups: Int64, fresh: Bool) -> tuple[Int64, Int64]:
    """Only the groups that hold a fresh document."""
    wanted = np.zeros(int(groups[-1]) + 1, np.bool_)
    wanted[groups[fresh[members]]] = True
    return members[wanted[groups]], groups[wanted[groups]]


def _dropped(
    members: Int64, groups: Int64, droppable: Comparable, signatures: Signatures | None = None, similarity: float = 0.0
) -> Iterator[tuple[Int64, Int64]]:
    """Documents that go, and the one of their group that each goes for: the first for which it may go and which stays.

    With ``signatures``, a document goes only for one with which it agrees in a share ``similarity`` of them.
    """
    rows: npt.NDArray[np.uint32] | None = None
    while len(members) > 1:
        starts = _starts(groups)
        place = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # of the first of each one's group
        rest = np.flatnonzero(~starts)
        found = droppable(members[place[rest]], members[rest])
        if signatures is not None:
            if rows is None and len(members) <= _HELD:
                rows = signatures.rows(members)  # groups of many that differ take as many turns: read them once
            pairs = np.flatnonzero(found)
            found[pairs] = signatures.agree(members, rows, place[rest[pairs]], rest[pairs]) >= similarity * SIGNATURE_SIZE
        if found.any():
            yield members[rest[found]], members[place[rest[found]]]
        left = rest[~found]
        members, groups = members[left], groups[left]
        rows = None if rows is None else rows[left]
