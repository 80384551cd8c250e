"""The layout of a safetensors file: eight bytes of length, a JSON header, then the tensors without a gap.

Written and parsed here rather than by the safetensors package because the data section is our preallocated buffer, and because
a reader must not touch a byte before its chunk is verified; the package reads the files as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from outgrow.errors import IntegrityError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package."""


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
    length = int.from_bytes(prefix, "little")
    if len(prefix) != LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise IntegrityError(f"not a safetensors file: a header of {length} bytes in a file of {file_bytes}", where=where)
    return length


def parse_header(text: bytes, data_bytes: int, where: str) -> dict[str, Slot]:
    """The slots of a header by key. Raises ``IntegrityError`` for anything but tensors that lie within ``data_bytes``."""
    try:
        table = json.loads(text)
        return {key: _slot(key, entry, data_bytes) for key, entry in table.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"not a safetensors header: {error!r}", where=where) from None


def _slot(key: str, entry: dict[str, Any], data_bytes: int) -> Slot:
    start, stop = entry["data_offsets"]
    slot = Slot(key, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)
    integers = all(type(number) is int for number in (start, stop, *slot.shape))
    if not integers or not 0 <= start <= stop <= data_bytes or stop - start != prod(slot.shape) * slot.dtype.itemsize:
        raise ValueError(
            f"{key}: bytes {start} to {stop} cannot be {entry['dtype']} {entry['shape']} within {data_bytes} bytes"
        )
    return slot
