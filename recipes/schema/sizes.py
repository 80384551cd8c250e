"""Bytes and bytes a second as people write them: ``500 GB``, ``64 MiB``, ``180 MB/s``, ``100 Mbit/s``."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator

from outgrow.recipes.schema.section import Mark

_UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_BITS = {"kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def parse_size(text: str) -> int:
    """Bytes. Raises ``ValueError`` with what is allowed."""
    match = _FORM.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"given '{text}'; allowed: a size such as 500 GB, in {', '.join(_UNITS)}")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def parse_rate(text: str) -> float:
    """Bytes a second. Raises ``ValueError`` with what is allowed."""
    amount, slash, second = text.strip().partition("/")
    match = _FORM.fullmatch(amount.strip())
    units = _UNITS | {name: bits / 8 for name, bits in _BITS.items()}
    if match is None or not slash or second.strip() != "s" or match[2] not in units or not float(match[1]):
        raise ValueError(f"given '{text}'; allowed: a rate such as 180 MB/s or 100 Mbit/s")
    return float(match[1]) * units[match[2]]


def _size(text: str) -> str:
    parse_size(text)
    return text


def _rate(text: str) -> str:
    parse_rate(text)
    return text


Size = Annotated[str, AfterValidator(_size), Mark.SIZE]
"""Bytes, as ``500 GB`` or ``64 MiB``."""
Rate = Annotated[str, AfterValidator(_rate), Mark.RATE]
"""Bytes a second, as ``180 MB/s`` or ``100 Mbit/s``."""
