"""Clusters of duplicates: documents that went for being like one and the same document that stayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.streaming.row_files import DroppedTable
from outgrow.streaming.selection import REASONS, Split

SHOWN = 12
"""Clusters that are shown, the biggest."""
EXAMPLES = 3
"""Documents that are named of each."""

_NUMBER_BITS = 44
"""Of a key: the twin's number; above them its split (1: held out) and its stream."""
_SPLITS: tuple[Split, ...] = ("train", "validation")
Describe: TypeAlias = Callable[[str, Split, int], tuple[str, str]]
"""Where a document of a stream and split came from, and the beginning of its text."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``kept`` names the document that stayed, ``beginning`` is that of its text; those that went are counted by stream
    (``members``) and by reason, and some of them named."""

    kept: str
    kept_stream: str
    held_out: bool
    beginning: str
    members: dict[str, int]
    reasons: dict[str, int]
    examples: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(self.members.values())


def cluster_sizes(dropped: Mapping[tuple[str, Split], DroppedTable]) -> list[tuple[int, int]]:
    """How many documents went for one that stayed, and for how many it was so many; ascending."""
    return sorted(Counter(_sizes(dropped)[1].tolist()).items())


def biggest_clusters(
    dropped: Mapping[tuple[str, Split], DroppedTable], streams: Sequence[str], describe: Describe
) -> list[Cluster]:
    """The biggest clusters, those that come first in the dataset before others of the same size.

    ``streams`` are those of the index in its order. Takes 40 bytes a dropped document.
    """
    keys, sizes = _sizes(dropped)
    order = np.lexsort((keys, -sizes))[:SHOWN]
    return [_cluster(dropped, streams, int(key), describe) for key in keys[order].tolist()]


def _sizes(dropped: Mapping[tuple[str, Split], DroppedTable]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The key of each document for which others went, and how many did."""
    keys = np.concatenate([np.empty(0, np.int64), *(_keys(table)[table.twin >= 0] for table in dropped.values())])
    return np.unique(keys, return_counts=True)


def _keys(table: DroppedTable) -> npt.NDArray[np.int64]:
    place = table.twin_stream.astype(np.int64) * 2 + table.twin_validation
    return (place << _NUMBER_BITS) + table.twin


def _cluster(
    dropped: Mapping[tuple[str, Split], DroppedTable], streams: Sequence[str], key: int, describe: Describe
) -> Cluster:
    members: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    for (name, split), table in dropped.items():
        own = np.flatnonzero((table.twin >= 0) & (_keys(table) == key))
        if len(own):
            members[name] += len(own)
            reasons.update(REASONS[code] for code in table.reason[own].tolist())
            numbers = table.document[own[: EXAMPLES - len(examples)]].tolist()
            examples += [describe(name, split, number)[0] for number in numbers]
    place, number = key >> _NUMBER_BITS, key & (2**_NUMBER_BITS - 1)
    split = _SPLITS[place % 2]
    source, beginning = describe(streams[place // 2], split, number)
    return Cluster(
        kept=source,
        kept_stream=streams[place // 2],
        held_out=split == "validation",
        beginning=beginning,
        members=dict(members),
        reasons=dict(reasons),
        examples=tuple(examples),
    )
