"""The files of a row index: windows of rows as blobs in one file, the table that finds them, and the documents left out.

<stream>.<split>.rows                  the blobs of the windows, one after the other
<stream>.<split>.windows.safetensors   ``WindowTable``: place and digest of each blob, and the rows before it
<stream>.<split>.dropped.safetensors   ``DroppedTable``: documents that are in no row, and why
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save_file

from outgrow.errors import IntegrityError
from outgrow.storage import digest
from outgrow.streaming.row_windows import Window
from outgrow.streaming.selection import Split

Int64: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowTable:
    """The windows of one split of one stream, W of them.

    offsets  int64 [W + 1]  where each window's blob begins in the file of rows, and where the last one ends
    digest   uint8 [W, 32]  sha256 of each blob
    rows     int64 [W + 1]  first row of each window, and the count of all
    """

    offsets: Int64
    digest: npt.NDArray[np.uint8]
    rows: Int64


@dataclass(frozen=True, eq=False, kw_only=True)
class DroppedTable:
    """Documents of one split of one stream that are in no row, D of them, ascending.

    document         int64 [D]  number in the stream's split
    reason           uint8 [D]  place in ``selection.REASONS``
    twin_stream      int16 [D]  stream of the document it is like, a place in the index's streams; -1 where there is none
    twin_validation  bool [D]   whether that document is a held-out one
    twin             int64 [D]  number of that document in its stream's split; -1 where there is none
    """

    document: Int64
    reason: npt.NDArray[np.uint8]
    twin_stream: npt.NDArray[np.int16]
    twin_validation: npt.NDArray[np.bool_]
    twin: Int64


def windows_file(name: str, split: Split) -> str:
    return f"{name}.{split}.windows.safetensors"


def rows_file(name: str, split: Split) -> str:
    return f"{name}.{split}.rows"


def dropped_file(name: str, split: Split) -> str:
    return f"{name}.{split}.dropped.safetensors"


def save_table(table: WindowTable | DroppedTable, path: Path) -> None:
    """Write a table as safetensors; not yet durable."""
    save_file({field.name: getattr(table, field.name) for field in fields(table)}, path)


def read_window_table(folder: Path, name: str, split: Split, expected: str) -> WindowTable:
    """Raises ``IntegrityError`` where the file is missing or its sha256 is not ``expected``."""
    return WindowTable(**_arrays(folder / windows_file(name, split), expected))


def read_dropped_table(folder: Path, name: str, split: Split, expected: str) -> DroppedTable:
    """Raises ``IntegrityError`` where the file is missing or its sha256 is not ``expected``."""
    return DroppedTable(**_arrays(folder / dropped_file(name, split), expected))


def _arrays(path: Path, expected: str) -> dict[str, npt.NDArray[Any]]:
    if not path.is_file():
        raise IntegrityError("the file is missing", where=str(path))
    data = path.read_bytes()
    if digest(data) != expected:
        raise IntegrityError("the bytes differ from their digest", where=str(path))
    return load(data)


class WindowWriter:
    """Writes the windows of one split of one stream into ``folder``, in order; ``finish`` writes the table. A context
    manager."""

    def __init__(self, folder: Path, name: str, split: Split) -> None:
        self._path = folder / rows_file(name, split)
        self._table_path = folder / windows_file(name, split)
        self._until_end = ExitStack()
        self._offsets, self._rows = [0], [0]
        self._digests: list[bytes] = []

    def __enter__(self) -> Self:
        self._file = self._until_end.enter_context(open(self._path, "wb"))
        return self

    def __exit__(self, *error: object) -> None:
        self._until_end.close()

    def write(self, window: Window) -> None:
        blob = window.encode()
        self._file.write(blob)
        self._offsets.append(self._offsets[-1] + len(blob))
        self._rows.append(self._rows[-1] + window.num_rows)
        self._digests.append(bytes.fromhex(digest(blob)))

    def finish(self) -> None:
        table = WindowTable(
            offsets=np.array(self._offsets, np.int64),
            digest=np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 32),
            rows=np.array(self._rows, np.int64),
        )
        save_table(table, self._table_path)


@dataclass(frozen=True, eq=False)
class WindowReader:
    """Gives the windows in a file of rows by number. Raises ``IntegrityError`` where one differs from its digest."""

    path: Path
    table: WindowTable

    def __call__(self, number: int) -> Window:
        start, stop = self.table.offsets[number : number + 2].tolist()
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                blob = file.read(stop - start)
        except FileNotFoundError:
            raise IntegrityError("the file is missing", where=str(self.path)) from None
        if digest(blob) != self.table.digest[number].tobytes().hex():
            raise IntegrityError(f"the bytes of window {number} differ from their digest", where=str(self.path))
        return Window.decode(blob)
