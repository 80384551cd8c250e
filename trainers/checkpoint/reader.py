"""A committed checkpoint opened for reading: a ``TensorSource`` that any layout fills itself from, box by box."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from math import prod
from typing import Any

import torch

from outgrow.contracts import CheckpointRef, JsonDict
from outgrow.errors import IntegrityError, ModelError
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import examine
from outgrow.trainers.checkpoint.format import BASE, LOADER, PIECES, RECIPE, Manifest, Piece, PieceIndex, TensorEntry, parse
from outgrow.trainers.checkpoint.tensor_file import DTYPE_NAMES, Slot, header_length, parse_header
from outgrow.trainers.checkpoint.verified import VerifiedFiles
from outgrow.trainers.regions import Region
from outgrow.trainers.safetensors_header import DTYPES, LENGTH_BYTES

BLOCK_BYTES = 64 * 1024 * 1024
"""Bytes of a tensor that are held besides the box that is being filled."""


def open_checkpoint(storage: Storage, ref: CheckpointRef) -> CheckpointReader:
    """The checkpoint that ``ref`` names. Raises ``IntegrityError`` where it is not whole or is not that one any more."""
    saved = examine(storage, ref.folder)
    if saved.ref.digest != ref.digest:
        raise IntegrityError("another checkpoint has been committed under this name", where=ref.folder)
    return CheckpointReader(storage, ref, saved.manifest)


class CheckpointReader:
    """Tensors by name and box, verified as they are read; any rank of any later group reads what it needs and no more.

    ``read`` raises ``IntegrityError`` for bytes that differ from their digest, ``ModelError`` for a name that was not saved.
    """

    def __init__(self, storage: Storage, ref: CheckpointRef, manifest: Manifest) -> None:
        self.ref = ref
        self.manifest = manifest
        self._files = VerifiedFiles(storage, ref.folder, manifest)
        self._tensors = parse(PieceIndex, bytes(self._files.read_all(PIECES)), self._files.where(PIECES)).tensors
        self._slots: dict[str, tuple[int, dict[str, Slot]]] = {}

    @property
    def step(self) -> int:
        """Optimizer steps that had been finished."""
        return self.manifest.step

    @cached_property
    def loader_state(self) -> JsonDict:
        return self._json(LOADER)

    @cached_property
    def recipe(self) -> JsonDict:
        return self._json(RECIPE)

    @cached_property
    def base(self) -> JsonDict | None:
        """The identity of the base that an adapter stands beside; None where all of the model is here."""
        return self._json(BASE) if BASE in self.manifest.files else None

    def verify(self) -> None:
        """Read every file through. Raises ``IntegrityError`` where a byte differs."""
        for file in self.manifest.files:
            self._files.verify(file)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise IntegrityError(f"{name}: unknown dtype {entry.dtype}", where=self._files.where(PIECES))
        return DTYPES[entry.dtype]

    def read(self, name: str, region: Region) -> torch.Tensor:
        """The values of ``region``, in the dtype that was saved, on the CPU."""
        whole = Region.whole(self.shape(name))
        if region.numel and region.intersect(whole) != region:
            raise ModelError(
                f"{name} has shape {whole.shape}; asked for {region.shape} at {region.offset}", where=self.ref.folder
            )
        box = torch.empty(region.shape, dtype=self.dtype(name))
        for piece in self._entry(name).pieces:
            common = region.intersect(Region(piece.offset, piece.shape))
            if common:
                self._copy(name, piece, common, box[common.within(region)])
        return box

    def _copy(self, name: str, piece: Piece, common: Region, target: torch.Tensor) -> None:
        """Copy ``common`` out of ``piece`` into ``target``, some rows at a time so that little is held twice."""
        data_start, slot = self._slot(name, piece)
        if not common.shape:
            target.copy_(self._tensor(piece.file, data_start + slot.start, slot.dtype, ()))
            return
        first, *inner = common.within(Region(piece.offset, piece.shape))
        row_shape = piece.shape[1:]
        row_bytes = prod(row_shape) * slot.dtype.itemsize
        rows = max(1, BLOCK_BYTES // row_bytes)
        for row in range(first.start, first.stop, rows):
            stop = min(row + rows, first.stop)
            block = self._tensor(piece.file, data_start + slot.start + row * row_bytes, slot.dtype, (stop - row, *row_shape))
            target[row - first.start : stop - first.start] = block[(slice(None), *inner)]

    def _tensor(self, file: str, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        data = self._files.read(file, start, start + prod(shape) * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _slot(self, name: str, piece: Piece) -> tuple[int, Slot]:
        """Where the data section of the piece's file starts, and where in it the piece lies."""
        if piece.file not in self._slots:
            self._slots[piece.file] = self._header(piece.file)
        data_start, slots = self._slots[piece.file]
        slot = slots.get(piece.key)
        if slot is None or slot.shape != piece.shape or DTYPE_NAMES[slot.dtype] != self._entry(name).dtype:
            raise IntegrityError(f"tensor {piece.key} is not what {PIECES} says of {name}", where=self._files.where(piece.file))
        return data_start, slot

    def _header(self, file: str) -> tuple[int, dict[str, Slot]]:
        size, where = self._files.size(file), self._files.where(file)
        prefix = self._files.read(file, 0, min(LENGTH_BYTES, size))
        data_start = LENGTH_BYTES + header_length(prefix, size, where)
        text = self._files.read(file, LENGTH_BYTES, data_start)
        return data_start, parse_header(bytes(text), size - data_start, where)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._tensors:
            raise ModelError(
                f"the checkpoint holds no tensor {name}", where=self.ref.folder, hint="the model of its recipe.json fits it"
            )
        return self._tensors[name]

    def _json(self, file: str) -> JsonDict:
        try:
            value: Any = json.loads(self._files.read_all(file))
        except ValueError as error:
            raise IntegrityError(f"not JSON: {error}", where=self._files.where(file)) from None
        if not isinstance(value, dict):
            raise IntegrityError("not a JSON object", where=self._files.where(file))
        return value
