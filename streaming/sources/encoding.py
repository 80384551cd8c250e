"""Bytes of a text file to text: UTF-8 or a byte order mark, else a detected encoding that leaves no doubt."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.errors import DataError
from outgrow.streaming.sources.document import BadRecordError

if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 1024 * 1024
_MIN_COHERENCE = 0.3
"""Least share of the text that charset-normalizer must recognise as a language."""
_MIN_LEAD = 0.1
"""Least lead in coherence over an encoding that would give another text."""


def check_encoding(stream: str, encoding: str) -> None:
    """Raises ``DataError`` where ``encoding`` is neither ``auto`` nor a codec that makes text of bytes."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8" if encoding == "auto" else encoding)
    except LookupError:
        raise DataError(
            f"stream '{stream}': there is no text encoding '{encoding}'", hint="give a Python codec name, or auto"
        ) from None


def read_text(path: Path, encoding: str) -> tuple[str, str]:
    """The text of a file and the codec it was decoded with, as ``decode``."""
    return decode(path.read_bytes(), encoding)


def decode(data: bytes, encoding: str) -> tuple[str, str]:
    """The text of ``data`` and the codec it was decoded with; ``encoding`` is a codec name or ``auto``.

    Raises ``BadRecordError`` where the codec does not fit, and under ``auto`` where more than one might.
    """
    if encoding != "auto":
        return _decode(data, encoding)
    for mark, marked in _MARKS:
        if data.startswith(mark):
            return _decode(data, marked)
    if b"\0" in data:
        raise _undecodable("it holds zero bytes: not text, or UTF-16 without a byte order mark")
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return _decode(data, _guess(data[:_SAMPLE_BYTES]))


def _decode(data: bytes, encoding: str) -> tuple[str, str]:
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise _undecodable(f"byte {error.start} is not {encoding}: {error.reason}") from None


def _guess(sample: bytes) -> str:
    import charset_normalizer  # slow to import, and most files never need it

    matches = list(charset_normalizer.from_bytes(sample))
    if not matches:
        raise _undecodable("no encoding fits")
    best = matches[0]
    rivals = [
        m
        for m in matches[1:]
        if m.coherence > best.coherence - _MIN_LEAD and not _is_far_fetched(m, best) and str(m) != str(best)
    ]
    if best.coherence < _MIN_COHERENCE or rivals:
        names = ", ".join(dict.fromkeys(match.encoding for match in [best, *rivals][:4]))
        raise _undecodable(f"its encoding is in doubt (perhaps {names})")
    return best.encoding


def _is_far_fetched(rival: CharsetMatch, best: CharsetMatch) -> bool:
    """Whether a rival is one of the old Macintosh encodings, which no longer write files, and its text the messier one. They
    share most letters with those of Windows, so their letters alone speak for them nearly as well."""
    return rival.encoding.startswith("mac_") and not best.encoding.startswith("mac_") and rival.chaos > best.chaos


def _undecodable(message: str) -> BadRecordError:
    """Says in plain words why bytes are not taken as text."""
    return BadRecordError(f"it cannot be read as text: {message}", reason="undecodable")
