"""One safetensors file, mapped into memory: a box of a tensor is a view of the file's pages, and costs a rank no memory.

The pages are the kernel's to drop when memory is short. They are mapped privately and must not be written to: a page that is
written to becomes the rank's own, and other than the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from outgrow.errors import ModelError
from outgrow.trainers.regions import Region
from outgrow.trainers.safetensors_header import DTYPES, LENGTH_BYTES, Entry, NotSafetensors, header_bytes, parse


class SafetensorsFile:
    """The tensors of a file by name, on the CPU, in the file's dtype."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raises ``ModelError`` where its header is not true of it, before a byte of a tensor is used."""
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            try:
                length = header_bytes(file.read(LENGTH_BYTES), num_bytes)
                self._data_start = LENGTH_BYTES + length
                self.entries: Mapping[str, Entry] = parse(file.read(length), num_bytes - self._data_start)
            except NotSafetensors as problem:
                raise ModelError(
                    f"not a whole safetensors file: {problem}", where=str(path), hint="fetch or save it again"
                ) from None
            # Private and writable: torch warns of memory that it may not write to, even where it never does.
            self._map = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def read(self, name: str, region: Region) -> torch.Tensor:
        """The values of ``region``, a view that must not be written to."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if not region.numel:
            return torch.empty(region.shape, dtype=dtype)
        if region.intersect(Region.whole(entry.shape)) != region:
            raise ModelError(f"{name} has shape {entry.shape}; asked for {region.shape} at {region.offset}")
        if not entry.shape:
            return self._elements(entry, 0, 1, dtype).reshape(())
        row = prod(entry.shape[1:])
        rows = self._elements(entry, region.offset[0] * row, region.shape[0] * row, dtype).view(-1, *entry.shape[1:])
        return rows[(slice(None), *region.slices[1:])]

    def _elements(self, entry: Entry, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        start = self._data_start + entry.start + first * dtype.itemsize
        if start % dtype.itemsize:
            # Of writers that do not pad the header: kernels of other libraries expect numbers at multiples of their size.
            copied = bytearray(self._map[start : start + count * dtype.itemsize])
            return torch.frombuffer(copied, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
