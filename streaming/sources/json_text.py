"""JSON as RFC 8259 has it, to plain values: what Python's decoder lets through and JSON does not allow is refused by name.

NaN and Infinity, numbers beyond a float, a key that comes twice in one object, half of a surrogate pair, and deep nesting: that
fails elsewhere by recursion, at a depth that depends on the caller.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from outgrow.streaming.sources.document import BadRecordError

MAX_DEPTH = 100
"""Lists and objects within each other, at most."""


def parse(text: str) -> Any:
    """The value of a whole text. Raises ``BadRecordError``."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} of it, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BadRecordError(f"it is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise _too_deep() from None
    except BadRecordError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise BadRecordError(f"it is not JSON that can be read: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _too_deep()
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecordError("it holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [item for parent in level for item in _items(parent)]
    return any(isinstance(item, dict | list) for item in level)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep() -> BadRecordError:
    return BadRecordError(f"lists and objects are nested too deeply; at most {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise BadRecordError(f"the key '{next(key for key in counts if counts[key] > 1)}' comes twice in one object")
    return value


def _constant(name: str) -> Any:
    raise BadRecordError(f"{name} is not JSON; give null or a number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadRecordError(f"{digits[:20]} is too large for a number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
