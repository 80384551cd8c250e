"""What lies in a checkpoint folder, as types that check what they parse. Pure; imports neither torch nor a file system.

    <run folder>/checkpoints/step-00001200/
        rank-00000.safetensors   the pieces that one rank of the saving group owned; one file a rank
        pieces.json              name -> dtype, full shape, and the box of it that each piece holds
        loader.json              the position in the data
        recipe.json              the recipe that was trained
        base.json                of an adapter alone: the identity of the base that it stands beside
        manifest.json            step, world, metrics; size of every file and a digest of each chunk of it
        COMMITTED                the digest of manifest.json, written last: without it there is no checkpoint

Tensors stand under their name and full shape, whatever engine or number of ranks held them, so a reader of any layout finds its
box. A save lies aside in ``.saving-<step>-<attempt>`` until it is whole; there each rank says in ``part-<rank>.json`` what it
wrote, or why it could not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from math import prod
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from outgrow.errors import IntegrityError
from outgrow.storage import digest

FOLDER = "checkpoints"
MARKER = "COMMITTED"
MANIFEST = "manifest.json"
PIECES = "pieces.json"
LOADER = "loader.json"
RECIPE = "recipe.json"
BASE = "base.json"
CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes that one digest covers, and so the least that a reader must read and verify for any tensor in it."""

_STEP = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"\.saving-(\d{8,})-(.+)")

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name without a folder in it: nothing that a checkpoint says can lead a reader out of its folder."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Shape = tuple[Count, ...]


class Stored(BaseModel):
    """Parsed strictly, frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"


class FileEntry(Stored):
    """Size of a file in bytes, and sha256 of each of its chunks; that of a file of one chunk is what sha256sum gives."""

    size: Count
    chunks: tuple[Digest, ...]


class Manifest(Stored):
    """What a checkpoint consists of. ``saved`` is Unix seconds; losses in ``metrics`` are nats a weighted token."""

    format: Literal[1] = 1
    step: Count
    world: Annotated[int, Field(ge=1)]
    attempt: str
    saved: float
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)] | None]
    chunk_bytes: Annotated[int, Field(ge=1)]
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _a_digest_for_every_chunk(self) -> Self:
        for name, entry in self.files.items():
            if len(entry.chunks) != -(-entry.size // self.chunk_bytes):
                raise ValueError(f"{name}: {len(entry.chunks)} digests for {entry.size} bytes")
        return self

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


class Piece(Stored):
    """One box of a tensor: tensor ``key`` of ``file``, and where in the full tensor it belongs."""

    file: FileName
    key: str
    offset: Shape
    shape: Shape


class TensorEntry(Stored):
    """A tensor at full shape (``dtype`` as safetensors spells it) and pieces that lie within it."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @model_validator(mode="after")
    def _pieces_lie_within(self) -> Self:
        for piece in self.pieces:
            inside = len(piece.offset) == len(piece.shape) == len(self.shape) and all(
                o + n <= full for o, n, full in zip(piece.offset, piece.shape, self.shape, strict=True)
            )
            if not inside:
                raise ValueError(f"{piece.file}: {piece.key} at {piece.offset} + {piece.shape} lies outside {self.shape}")
        return self


class PieceIndex(Stored):
    """All tensors of a checkpoint by name; the pieces of each cover it exactly once."""

    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _each_element_stands_once(self) -> Self:
        for name, entry in self.tensors.items():
            held = sum(prod(piece.shape) for piece in entry.pieces)
            if held != prod(entry.shape):
                raise ValueError(f"{name}: its pieces hold {held} of {prod(entry.shape)} elements")
            if _overlap(entry.pieces):
                raise ValueError(f"{name}: two of its pieces overlap")
        return self


def _overlap(pieces: tuple[Piece, ...]) -> bool:
    """Whether two boxes share an element; sorted by their first row, so that shards of rows cost no quadratic time."""
    ordered = sorted(pieces, key=lambda piece: piece.offset)
    for number, low in enumerate(ordered):
        for high in islice(ordered, number + 1, None):
            if low.offset and high.offset[0] >= low.offset[0] + low.shape[0]:
                break
            if all(o < p + n and p < o + m for p, n, o, m in zip(low.offset, low.shape, high.offset, high.shape, strict=True)):
                return True
    return False


class Part(Stored):
    """What one rank wrote for a save: its data file and the pieces in it, or in ``error`` why it could not."""

    rank: Count
    error: str = ""
    file: FileEntry | None = None
    tensors: dict[str, TensorEntry] = {}

    def sealed(self) -> bytes:
        """The bytes of the part file: a digest, then what it is of."""
        data = self.to_bytes()
        return f"{digest(data)}\n".encode() + data

    @classmethod
    def unseal(cls, data: bytes, where: str) -> Part:
        expected, _, body = data.partition(b"\n")
        if digest(body).encode() != expected:
            raise IntegrityError("the bytes differ from their digest", where=where)
        return parse(cls, body, where)


StoredType = TypeVar("StoredType", bound=Stored)


def parse(kind: type[StoredType], data: bytes, where: str) -> StoredType:
    """``data`` (JSON) as ``kind``. Raises ``IntegrityError`` that names ``where`` and the first thing that does not fit."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in first["loc"])
        raise IntegrityError(
            f"not a {kind.__name__} of this format: {place + ': ' if place else ''}{first['msg']}", where=where
        ) from None


def merge(parts: Mapping[str, Part]) -> PieceIndex:
    """The pieces of all ranks as one index, ``parts`` being named by their data file.

    Raises ``IntegrityError`` where they do not fit together: ranks that differ about a tensor, elements that nobody wrote.
    """
    tensors: dict[str, TensorEntry] = {}
    for file, part in parts.items():
        for name, entry in part.tensors.items():
            known = tensors.get(name)
            if known and (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise IntegrityError(
                    f"{name}: {entry.dtype} {entry.shape}, on another rank {known.dtype} {known.shape}", where=file
                )
            pieces = (*known.pieces, *entry.pieces) if known else entry.pieces
            tensors[name] = TensorEntry(dtype=entry.dtype, shape=entry.shape, pieces=pieces)
    try:
        return PieceIndex(tensors=dict(sorted(tensors.items())))
    except ValidationError as error:
        raise IntegrityError(f"the ranks' pieces do not fit together: {error.errors(include_url=False)[0]['msg']}") from None


def to_json(value: object) -> bytes:
    """``value`` as JSON; raises ``ValueError`` for a number that is not finite, which JSON cannot say."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def step_folder(run_folder: str, step: int) -> str:
    return f"{run_folder}/{FOLDER}/step-{step:08d}"


def aside_folder(run_folder: str, step: int, attempt: str) -> str:
    return f"{run_folder}/{FOLDER}/.saving-{step:08d}-{attempt}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None where the name is something else's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def aside_of(name: str) -> tuple[int, str] | None:
    """Step and attempt of the save that a folder's name belongs to; None where it is no folder aside."""
    match = _ASIDE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def data_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def part_file(rank: int) -> str:
    return f"part-{rank:05d}.json"
