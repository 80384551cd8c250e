"""The index of an MDS folder, which may be hostile: each shard is a plain MDS file of that very folder, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest

INDEX = "index.json"
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
    """``raw`` is the shard itself, ``zipped`` its compressed form, which then may be the only file there."""

    raw: File
    zipped: File | None
    samples: int
    columns: Mapping[str, Column]


def read_index(folder: Path, expected: str | None) -> list[Shard]:
    """The shards of ``folder`` in order. ``expected`` is the sha256 of the index, None where nobody has told it.

    Raises ``DataError`` where the index is missing, malformed or hostile, ``IntegrityError`` where it differs.
    """
    path = folder / INDEX
    if not path.is_file():
        raise DataError("there is no MDS index", where=str(path), hint="an MDS folder holds index.json and its shards")
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise DataError(f"the index is larger than {_MAX_INDEX_BYTES:,} bytes", where=str(path))
    text = path.read_bytes()
    if expected is not None and digest(text) != expected:
        raise IntegrityError("the bytes differ from their digest", where=str(path))
    try:
        entries = _Index.model_validate_json(text, strict=True).shards
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"not an MDS index of version 2: {key}: {first['msg']}", where=str(path)) from None
    seen: set[str] = set()
    shards = []
    for entry in entries:
        problem = _problem(entry, seen)
        if problem:
            raise DataError(problem, where=str(path))
        shards.append(_shard(entry))
    return shards


class _File(BaseModel):
    basename: str
    bytes: Annotated[int, Field(ge=8, le=_MAX_SHARD_BYTES)]
    hashes: dict[str, str]


class _Shard(BaseModel):
    version: Literal[2]
    format: Literal["mds"]
    compression: str | None
    raw_data: _File
    zip_data: _File | None
    samples: Annotated[int, Field(ge=0)]
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[Annotated[int, Field(ge=0)] | None]


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
        seen.add(file.basename)
    name = entry.raw_data.basename
    if 4 * (entry.samples + 2) > entry.raw_data.bytes:
        return f"{name}: {entry.samples:,} samples do not fit into {entry.raw_data.bytes:,} bytes"
    if (entry.compression or "zstd").split(":")[0] != "zstd":
        return f"{name}: compression '{entry.compression}' is not read; read are: none, zstd"
    names = entry.column_names
    if not len(set(names)) == len(names) == len(entry.column_encodings) == len(entry.column_sizes):
        return f"{name}: column names, encodings and sizes do not match"
    if "pkl" in entry.column_encodings:
        return f"{name}: column '{names[entry.column_encodings.index('pkl')]}' holds pickles, which are never read"
    return ""


def _shard(entry: _Shard) -> Shard:
    zipped = entry.zip_data
    columns = zip(entry.column_names, entry.column_encodings, entry.column_sizes, strict=True)
    return Shard(
        raw=File(entry.raw_data.basename, entry.raw_data.bytes, entry.raw_data.hashes),
        zipped=File(zipped.basename, zipped.bytes, zipped.hashes) if zipped else None,
        samples=entry.samples,
        columns={name: Column(name, encoding, size or None) for name, encoding, size in columns},
    )
