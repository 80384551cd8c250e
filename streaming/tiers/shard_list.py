"""Every shard of a token store under one number, with its name, size and digest: what tiers plan and move by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.errors import IntegrityError
from outgrow.storage import digest
from outgrow.streaming.manifest import FILES, STORE_MANIFEST, read_manifest
from outgrow.streaming.selection import Split
from outgrow.streaming.shards import SHARDS, ShardTable

Int64: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A shard as a file: ``name`` is its path below the store, ``sha256`` of the file as stored."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class ShardList:
    """The shards of the training splits, stream after stream in the order of ``streams``, then likewise those held out.

    ``num_bytes`` int64 [shards] is the size of each file; ``ends`` int64 [2 * streams] counts the shards up to and including
    each split.
    """

    streams: tuple[str, ...]
    tables: tuple[ShardTable, ...]
    ends: Int64
    num_bytes: Int64

    @classmethod
    def open(cls, store: Path, streams: Sequence[str]) -> Self:
        """Of a store whose ``store.json`` and ``shards.safetensors`` are in the folder ``store``; its shards need not be.

        ``streams`` in the order of the row index. Raises ``IntegrityError`` where a byte differs.
        """
        digests = read_manifest(store, STORE_MANIFEST)[FILES]
        tables = tuple(_table(store, split_folder(name, split), digests) for split in _SPLITS for name in streams)
        sizes = [np.where(table.zip_bytes, table.zip_bytes, table.raw_bytes) for table in tables]
        return cls(
            tuple(streams),
            tables,
            np.cumsum([len(table) for table in tables], dtype=np.int64),
            np.concatenate([*sizes, np.empty(0, np.int64)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.num_bytes)

    def number(self, stream: int, split: Split, shard: int) -> int:
        """Number of shard ``shard`` of a split of stream number ``stream``."""
        at = self._place(stream, split)
        return (int(self.ends[at - 1]) if at else 0) + shard

    def numbers(self, stream: int, split: Split) -> range:
        """The numbers of a split's shards, in their order."""
        at = self._place(stream, split)
        return range(int(self.ends[at - 1]) if at else 0, int(self.ends[at]))

    def locate(self, number: int) -> tuple[str, Split, int]:
        """Stream, split, and shard of the split."""
        at = int(np.searchsorted(self.ends, number, "right"))
        split, stream = divmod(at, len(self.streams))
        return self.streams[stream], _SPLITS[split], number - (int(self.ends[at - 1]) if at else 0)

    def file(self, number: int) -> ShardFile:
        stream, split, shard = self.locate(number)
        table = self.tables[self._place(self.streams.index(stream), split)]
        return ShardFile(
            name=f"{split_folder(stream, split)}/{table.name(shard)}",
            num_bytes=table.stored_bytes(shard),
            sha256=table.sha256(shard),
        )

    def documents(self, stream: int, split: Split) -> Int64:
        """Documents of a split up to and including each of its shards, int64 [shards of the split]."""
        return np.cumsum(self.tables[self._place(stream, split)].samples, dtype=np.int64)

    def _place(self, stream: int, split: Split) -> int:
        return _SPLITS.index(split) * len(self.streams) + stream


_SPLITS: tuple[Split, Split] = ("train", "validation")


def split_folder(stream: str, split: Split) -> str:
    """The MDS folder of a split, below the store."""
    return f"streams/{stream}/{split}"


def _table(store: Path, folder: str, digests: dict[str, str]) -> ShardTable:
    path = store / folder / SHARDS
    if not path.is_file():
        raise IntegrityError("the file is missing", where=str(path))
    data = path.read_bytes()
    if digest(data) != digests.get(f"{folder}/{SHARDS}"):
        raise IntegrityError("the bytes differ from their digest", where=str(path))
    return ShardTable.parse(data)
