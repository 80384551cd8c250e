"""Which shards an MDS folder has: a foreign one by its ``index.json``, one of ours by ``shards.safetensors``.

A foreign index may be hostile: each shard is a plain MDS file of that very folder, or the index is refused. Our table was
written by the build and is checked against its digest; a million shards open in a fraction of a second.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest
from outgrow.streaming.shards import INDEX, SHARDS, ShardTable, shard_name

Int64: TypeAlias = npt.NDArray[np.int64]

_MAX_INDEX_BYTES = 2**30
_MAX_SHARD_BYTES = 2**32
"""MDS keeps offsets as uint32."""


@dataclass(frozen=True)
class File:
    """A file of the folder as its index describes it; ``hashes`` by algorithm, hex."""

    name: str
    num_bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Column:
    """``size`` is the bytes of each value, None where every sample states its own."""

    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True)
class Shard:
    """``raw`` is the shard itself, ``zipped`` its compressed form, which then is the only file there if ``zipped_alone``.

    ``columns`` in the order in which a sample holds them; None where the shard's own header tells.
    """

    raw: File
    zipped: File | None
    zipped_alone: bool
    samples: int
    columns: Mapping[str, Column] | None


class Shards(Protocol):
    """The shards of a folder in order; ``ends`` int64 [shards] counts the samples up to and including each."""

    @property
    def ends(self) -> Int64: ...
    def shard(self, number: int) -> Shard: ...


# --- ours -------------------------------------------------------------------------------------------------------------


class OurShards:
    """The shards that a build wrote, from its table; each is described when it is asked for."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table
        self.ends: Int64 = np.cumsum(table.samples, dtype=np.int64)

    def shard(self, number: int) -> Shard:
        table = self._table
        raw_bytes, zip_bytes = int(table.raw_bytes[number]), int(table.zip_bytes[number])
        stored = {"sha256": table.sha256(number)}
        return Shard(
            raw=File(shard_name(number, compressed=False), raw_bytes, {} if zip_bytes else stored),
            zipped=File(shard_name(number, compressed=True), zip_bytes, stored) if zip_bytes else None,
            zipped_alone=True,
            samples=int(table.samples[number]),
            columns=None,
        )


def read_our_shards(folder: Path, expected: str) -> OurShards:
    """The shards of a folder of ours; ``expected`` is the sha256 of its ``shards.safetensors``.

    Raises ``IntegrityError`` where that file is missing or differs.
    """
    path = folder / SHARDS
    if not path.is_file():
        raise IntegrityError("the file is missing", where=str(path))
    data = path.read_bytes()
    if digest(data) != expected:
        raise IntegrityError("the bytes differ from their digest", where=str(path))
    return OurShards(ShardTable.parse(data, str(path)))


def header_columns(header: bytes) -> dict[str, Column]:
    """The columns that the JSON header of a shard tells. Raises ``ValueError`` where it does not."""
    try:
        told = _Columns.model_validate_json(header, strict=True)
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    if problem := _column_problem(told):
        raise ValueError(problem)
    return _columns(told)


# --- foreign ones -----------------------------------------------------------------------------------------------------


class ListedShards:
    """The shards that a foreign ``index.json`` lists."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self.ends: Int64 = np.cumsum([shard.samples for shard in shards], dtype=np.int64)

    def shard(self, number: int) -> Shard:
        return self._shards[number]


def read_index(folder: Path) -> ListedShards:
    """The shards of a foreign folder. Raises ``DataError`` where its index is missing, malformed or hostile."""
    path = folder / INDEX
    try:
        with open(open_plain(path), "rb") as file:
            text = file.read(_MAX_INDEX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        hint = "an MDS folder holds index.json and its shards"
        raise DataError("there is no MDS index", where=str(path), hint=hint) from None
    if len(text) > _MAX_INDEX_BYTES:
        raise DataError(f"the index is larger than {_MAX_INDEX_BYTES:,} bytes", where=str(path))
    try:
        entries = _Index.model_validate_json(text, strict=True).shards
    except ValidationError as error:
        raise DataError(f"not an MDS index of version 2: {_first(error)}", where=str(path)) from None
    seen: set[str] = set()
    shards = []
    for entry in entries:
        problem = _problem(entry, seen)
        if problem:
            raise DataError(problem, where=str(path))
        shards.append(_shard(entry))
    return ListedShards(shards)


def open_plain(path: Path) -> int:
    """The descriptor of a file, open for reading. Raises ``DataError`` where it is a link, a folder, a pipe or a device."""
    try:
        # A pipe is opened without waiting for one who writes to it.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError("a file of an MDS folder may not be a link", where=str(path)) from None
        if error.errno == errno.ENXIO:
            raise DataError("it is no plain file", where=str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DataError("it is no plain file", where=str(path))
    return fd


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, with its key."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


class _File(BaseModel):
    basename: str
    bytes: Annotated[int, Field(ge=8, le=_MAX_SHARD_BYTES)]
    hashes: dict[str, str]


class _Columns(BaseModel):
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[Annotated[int, Field(ge=0, le=_MAX_SHARD_BYTES)] | None]


class _Shard(_Columns):
    version: Literal[2]
    format: Literal["mds"]
    compression: str | None
    raw_data: _File
    zip_data: _File | None
    samples: Annotated[int, Field(ge=0)]


class _Index(BaseModel):
    version: Literal[2]
    shards: list[_Shard]


def _problem(entry: _Shard, seen: set[str]) -> str:
    """What is wrong with a shard beyond the types of its fields; empty where it can be read. Adds its names to ``seen``."""
    for file in filter(None, (entry.raw_data, entry.zip_data)):
        if not file.basename or file.basename in (".", "..") or set(file.basename) & set("/\\\0"):
            return f"shard name {file.basename!r} is not a file of this folder"
        if file.basename in seen:
            return f"shard name {file.basename!r} is listed twice"
        if without_end := [algorithm for algorithm in file.hashes if algorithm.startswith("shake")]:
            return f"{file.basename}: the digest {without_end[0]} has no length of its own, and is not read"
        seen.add(file.basename)
    name = entry.raw_data.basename
    least = 4 * (entry.samples + 2) + entry.samples * sum(size or 4 for size in entry.column_sizes)
    if least > entry.raw_data.bytes:
        return f"{name}: {entry.samples:,} samples do not fit into {entry.raw_data.bytes:,} bytes"
    if (entry.compression or "zstd").split(":")[0] != "zstd":
        return f"{name}: compression '{entry.compression}' is not read; read are: none, zstd"
    problem = _column_problem(entry)
    return f"{name}: {problem}" if problem else ""


def _column_problem(told: _Columns) -> str:
    """What is wrong with the columns of a shard; empty where they can be read."""
    names = told.column_names
    if not names:
        return "it has no columns"
    if not len(set(names)) == len(names) == len(told.column_encodings) == len(told.column_sizes):
        return "column names, encodings and sizes do not match"
    if "pkl" in told.column_encodings:
        return f"column '{names[told.column_encodings.index('pkl')]}' holds pickles, which are never read"
    return ""


def _shard(entry: _Shard) -> Shard:
    zipped = entry.zip_data
    return Shard(
        raw=File(entry.raw_data.basename, entry.raw_data.bytes, entry.raw_data.hashes),
        zipped=File(zipped.basename, zipped.bytes, zipped.hashes) if zipped else None,
        zipped_alone=False,
        samples=entry.samples,
        columns=_columns(entry),
    )


def _columns(told: _Columns) -> dict[str, Column]:
    columns = zip(told.column_names, told.column_encodings, told.column_sizes, strict=True)
    return {name: Column(name, encoding, size or None) for name, encoding, size in columns}
