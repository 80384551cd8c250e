"""What a safetensors file says of itself, believed only where it is all true: checked before a byte of any tensor is used.

A file is eight bytes of length, a JSON header, and the tensors. The header comes from a stranger: its length may be a lie, its
tensors may overlap, lie outside of the file or leave bytes that belong to none. Each of these is refused with the name of the
tensor, by integers of Python, which do not overflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""What a tensor of a file may be, by the format's names."""

_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype by the format's name, and bytes ``start`` to ``stop`` of what follows the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class NotSafetensors(ValueError):
    """What a file says of itself is not true."""


def header_bytes(prefix: bytes | bytearray, file_bytes: int) -> int:
    """Length of the JSON behind the first eight bytes, ``prefix``. Raises ``NotSafetensors`` where the file cannot hold it."""
    if len(prefix) < LENGTH_BYTES:
        raise NotSafetensors(f"{file_bytes} bytes, of which the length of the header alone takes {LENGTH_BYTES}")
    length, most = int.from_bytes(prefix, "little"), file_bytes - LENGTH_BYTES
    if length > most:
        raise NotSafetensors(f"its header has {length:,} bytes, and {most:,} are there")
    if length > MAX_HEADER_BYTES:
        raise NotSafetensors(f"its header has {length:,} bytes; allowed: {MAX_HEADER_BYTES:,}")
    return length


def parse(text: bytes, data_bytes: int) -> dict[str, Entry]:
    """The tensors of a header by name, which fill ``data_bytes`` one after the other without a gap.

    Raises ``NotSafetensors`` with the tensor that cannot be so.
    """
    try:
        table = json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise NotSafetensors(f"its header is not JSON: {error}") from None
    except _Twins as twins:
        raise NotSafetensors(f"its header names {ascii(twins.name)} twice") from None
    if not isinstance(table, dict):
        raise NotSafetensors("its header is not a JSON object")
    entries = {name: _entry(name, given) for name, given in table.items() if name != _METADATA}
    _check_cover(entries, data_bytes)
    return entries


def _entry(name: str, given: Any) -> Entry:
    if not isinstance(given, dict) or given.keys() != _KEYS:
        raise NotSafetensors(f"{ascii(name)}: dtype, shape and data_offsets are asked for, and nothing else")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise NotSafetensors(f"{ascii(name)}: unknown dtype {ascii(dtype)}; known: {', '.join(DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise NotSafetensors(f"{ascii(name)}: its shape and its two offsets must be whole numbers from 0")
    start, stop = offsets
    needed = prod(shape) * DTYPES[dtype].itemsize
    if stop - start != needed:
        raise NotSafetensors(f"{ascii(name)}: {dtype} {shape} takes {needed:,} bytes, and bytes {start:,} to {stop:,} hold it")
    return Entry(dtype, tuple(shape), start, stop)


def _check_cover(entries: Mapping[str, Entry], data_bytes: int) -> None:
    """Raise where two tensors share bytes, bytes belong to none, or a tensor ends behind the file."""
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > data_bytes:
            raise NotSafetensors(f"{ascii(name)} ends at byte {entry.stop:,} of {data_bytes:,}")
        if entry.start < end:
            raise NotSafetensors(f"{ascii(name)} and {ascii(before)} overlap")
        if entry.start > end:
            raise NotSafetensors(f"bytes {end:,} to {entry.start:,}, before {ascii(name)}, belong to no tensor")
        end, before = entry.stop, name
    if end != data_bytes:
        raise NotSafetensors(f"the last {data_bytes - end:,} bytes belong to no tensor")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


class _Twins(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; which of two values of one name counts is not the reader's to choose."""
    table = dict[str, Any]()
    for name, value in pairs:
        if name in table:
            raise _Twins(name)
        table[name] = value
    return table
