"""The shards of one of our MDS folders without their names and JSON: what readers of ours open a folder by.

``shards.safetensors`` stands beside MosaicML's ``index.json`` and says the same in 52 bytes a shard, so that a folder of a
million shards opens at once; it also holds the digests that the store's manifest, being JSON, leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest

SHARDS = "shards.safetensors"
INDEX = "index.json"
ShardEntry: TypeAlias = dict[str, Any]
"""A shard as MosaicML's index lists it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardTable:
    """The shards of an MDS folder in order, S of them.

    samples    int32 [S]      documents in each
    raw_bytes  int64 [S]      size before compression
    zip_bytes  int64 [S]      size of the compressed file, which then is the only one; 0: not compressed
    digest     uint8 [S, 32]  sha256 of the file as stored
    """

    samples: npt.NDArray[np.int32]
    raw_bytes: npt.NDArray[np.int64]
    zip_bytes: npt.NDArray[np.int64]
    digest: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, shard: int) -> str:
        """The file of shard number ``shard``."""
        return shard_name(shard, compressed=bool(self.zip_bytes[shard]))

    def stored_bytes(self, shard: int) -> int:
        """Size of that file."""
        return int(self.zip_bytes[shard] or self.raw_bytes[shard])

    def sha256(self, shard: int) -> str:
        """Digest of that file, hex."""
        data: bytes = self.digest[shard].tobytes()
        return data.hex()

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return int(np.where(self.zip_bytes, self.zip_bytes, self.raw_bytes).sum())

    def save(self, folder: Path) -> None:
        """Write it as ``shards.safetensors`` of an MDS folder; not yet durable."""
        save_file({field.name: getattr(self, field.name) for field in fields(self)}, folder / SHARDS)

    @classmethod
    def parse(cls, data: bytes, where: str = "") -> Self:
        """The table that ``save`` wrote to ``where``. Raises ``DataError`` for bytes that hold none: a digest proves that they
        are what was written, not who wrote them."""
        try:
            table = cls(**load(data))
        except (SafetensorError, TypeError) as error:
            raise DataError(f"this is no table of shards: {error}", where=where) from None
        if problem := _problem(table):
            raise DataError(f"this is no table of shards: {problem}", where=where)
        return table

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> Self:
        """The table of shards as ``index.json`` lists them."""
        samples, raw_bytes, zip_bytes, digests = [], [], [], []
        for entry in entries:
            stored = _stored(entry)
            samples.append(entry["samples"])
            raw_bytes.append(entry["raw_data"]["bytes"])
            zip_bytes.append(entry["zip_data"]["bytes"] if entry["zip_data"] else 0)
            digests.append(bytes.fromhex(stored["hashes"]["sha256"]))
        return cls(
            samples=np.array(samples, np.int32),
            raw_bytes=np.array(raw_bytes, np.int64),
            zip_bytes=np.array(zip_bytes, np.int64),
            digest=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        )


def _problem(table: ShardTable) -> str:
    """What cannot be true of a table; empty where all can be."""
    count = len(table.samples) if table.samples.ndim else 0
    forms = {"samples": ("int32", (count,)), "raw_bytes": ("int64", (count,)), "zip_bytes": ("int64", (count,))}
    for name, form in {**forms, "digest": ("uint8", (count, 32))}.items():
        array = getattr(table, name)
        if (array.dtype.name, array.shape) != form:
            return f"{name} is {array.dtype}{list(array.shape)}, and should be {form[0]}{list(form[1])}"
    most = 2**32  # MDS keeps offsets as uint32
    if np.any(table.samples < 0) or np.any(4 * (table.samples.astype(np.int64) + 2) > table.raw_bytes):
        return "the samples of a shard do not fit into it"
    if np.any(table.raw_bytes > most) or np.any((table.zip_bytes < 0) | (table.zip_bytes > most)):
        return f"a shard has no more than {most:,} bytes"
    return ""


def shard_name(shard: int, *, compressed: bool) -> str:
    """The file that MosaicML's writer gives shard number ``shard``."""
    return f"shard.{shard:05}.mds" + (".zstd" if compressed else "")


def stored_name(entry: ShardEntry) -> str:
    """The file of a shard as ``index.json`` lists it."""
    return str(_stored(entry)["basename"])


def _stored(entry: ShardEntry) -> Mapping[str, Any]:
    stored: Mapping[str, Any] = entry["zip_data"] or entry["raw_data"]
    return stored


def write_index(folder: Path, entries: Iterable[ShardEntry]) -> None:
    """Write ``index.json`` as MosaicML's readers want it, a shard at a time."""
    with open(folder / INDEX, "w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for number, entry in enumerate(entries):
            file.write((", " if number else "") + json.dumps(entry, sort_keys=True))
        file.write('], "version": 2}')


def every_file(digests: Mapping[str, str], read: Callable[[str], bytes]) -> Iterator[tuple[str, str]]:
    """Path and sha256 of every file that a manifest vouches for: those in its ``files``, ``digests``, and the shards of every
    ``shards.safetensors`` among them, which ``read`` gives.

    Raises ``IntegrityError`` where such a table differs.
    """
    for path, expected in sorted(digests.items()):
        yield path, expected
        folder, _, name = path.rpartition("/")
        if name == SHARDS:
            data = read(path)
            if digest(data) != expected:
                raise IntegrityError("the bytes differ from their digest", where=path)
            table = ShardTable.parse(data, path)
            for shard in range(len(table)):
                yield f"{folder}/{table.name(shard)}", table.sha256(shard)
