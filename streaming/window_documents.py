"""The documents of one window, as the row index needs them: a store's document tables, regrouped by windows of shards.

A window is a run of neighbouring shards that is shuffled, packed and read as a whole. It knows nothing of the parts of a build:
one may begin in one table and end in another. Only a table and a window are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.streaming.document_table import DocumentTable
from outgrow.streaming.row_cuts import Borders

Int64: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowDocuments:
    """The N documents of window ``number``, of which the first is document ``first`` of the split.

    ``lengths`` int64 [N], ``weight`` float64 [N], ``uniform`` bool [N] as in ``DocumentTable``.
    """

    number: int
    first: int
    lengths: Int64
    weight: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.bool_]
    borders: Borders

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def plain(self) -> npt.NDArray[np.bool_]:
        """Whether every token of a document but its first is a target of weight 1, bool [N]."""
        plain: npt.NDArray[np.bool_] = self.uniform & (self.weight == self.lengths - 1)
        return plain


def windows_of(tables: Iterable[DocumentTable], window_shards: int) -> Iterator[WindowDocuments]:
    """The windows in order. Raises ``DataError`` where the documents are not in the order of their shards, or one is empty."""
    number, first, parts = -1, 0, list[DocumentTable]()
    for table in tables:
        windows = table.shard.astype(np.int64) // window_shards
        if np.any(np.diff(windows, prepend=number) < 0) or np.any(table.lengths < 1):
            raise DataError("the documents of a table are not in the order of their shards, or have no token")
        begins = np.flatnonzero(np.diff(windows, prepend=-1))
        border_first = np.concatenate([[0], np.cumsum(table.border_counts, dtype=np.int64)])
        for begin, stop in zip(begins.tolist(), [*begins[1:].tolist(), len(table)], strict=True):
            if windows[begin] != number and parts:
                yield _joined(number, first, parts)
                first += sum(len(part) for part in parts)
                parts = []
            number = int(windows[begin])
            parts.append(_part(table, begin, stop, border_first))
    if parts:
        yield _joined(number, first, parts)


def _part(table: DocumentTable, begin: int, stop: int, border_first: Int64) -> DocumentTable:
    """Documents ``begin`` to ``stop`` of a table; views."""
    per_document = ("lengths", "shard", "weight", "uniform", "chars", "content", "border_counts")
    columns = {name: getattr(table, name)[begin:stop] for name in per_document}
    return DocumentTable(**columns, borders=table.borders[border_first[begin] : border_first[stop]])


def _joined(number: int, first: int, parts: list[DocumentTable]) -> WindowDocuments:
    def column(name: str) -> npt.NDArray[Any]:
        columns: list[npt.NDArray[Any]] = [getattr(part, name) for part in parts]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    return WindowDocuments(
        number=number,
        first=first,
        lengths=column("lengths"),
        weight=column("weight"),
        uniform=column("uniform"),
        borders=Borders.of(column("border_counts"), column("borders")),
    )
