"""The layout of a safetensors file: eight bytes of length, a JSON header, then the tensors without a gap.

Written and read here rather than by the safetensors package because the data section is our preallocated buffer, and because a
reader must not touch a byte before its chunk is verified; the package reads the files as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from outgrow.errors import IntegrityError
from outgrow.trainers.safetensors_header import DTYPES, LENGTH_BYTES, NotSafetensors, header_bytes, parse

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: bytes ``start`` to ``stop`` of the data section."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[Slot, ...]:
    """A slot for each (key, dtype, shape), widest dtype first so that each starts at a multiple of its item size."""
    slots: list[Slot] = []
    end = 0
    for key, dtype, shape in sorted(tensors, key=lambda t: (-t[1].itemsize, t[0])):
        start, end = end, end + prod(shape) * dtype.itemsize
        slots.append(Slot(key, dtype, shape, start, end))
    return tuple(slots)


def encode_header(slots: Iterable[Slot]) -> bytes:
    """All that stands before the data section; its length is a multiple of 8, so that the data is aligned in the file too."""
    table = {
        slot.key: {"dtype": DTYPE_NAMES[slot.dtype], "shape": slot.shape, "data_offsets": (slot.start, slot.stop)}
        for slot in slots
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return struct.pack("<Q", len(text)) + text


def header_length(prefix: bytes | bytearray, file_bytes: int, where: str) -> int:
    """Bytes of the JSON that follows the first eight. Raises ``IntegrityError`` where the file cannot hold it."""
    try:
        return header_bytes(prefix, file_bytes)
    except NotSafetensors as problem:
        raise IntegrityError(f"not a safetensors file: {problem}", where=where) from None


def parse_header(text: bytes, data_bytes: int, where: str) -> dict[str, Slot]:
    """The slots of a header by key. Raises ``IntegrityError`` for anything but tensors that fill ``data_bytes``."""
    try:
        entries = parse(text, data_bytes)
    except NotSafetensors as problem:
        raise IntegrityError(f"not a safetensors header: {problem}", where=where) from None
    return {key: Slot(key, DTYPES[entry.dtype], entry.shape, entry.start, entry.stop) for key, entry in entries.items()}
