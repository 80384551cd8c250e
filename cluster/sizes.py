"""Bytes as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes for a person: ``59.0 MB``; decimal units, as disks are sold."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
