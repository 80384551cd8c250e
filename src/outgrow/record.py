"""A frozen dataclass that goes through JSON and back unchanged."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeAlias

JsonDict: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A frozen value that goes through JSON and back unchanged; nested records, and lists and dicts of them, too."""

    def to_dict(self) -> JsonDict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record that ``to_dict`` wrote. Raises ``KeyError``/``TypeError`` on missing or unknown fields."""
        hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise TypeError(f"{cls.__name__}: unknown fields {', '.join(unknown)}")
        return cls(**{name: _revive(hints[name], value) for name, value in data.items()})


@functools.cache
def _hints(cls: type[Record]) -> dict[str, Any]:
    """The types of the fields; worked out for each record anew they took most of the time of reading an ``events.jsonl``."""
    return typing.get_type_hints(cls)


def _revive(hint: Any, value: Any) -> Any:
    """``value`` (JSON) as the type that ``hint`` names; tuples are homogeneous (``tuple[X, ...]``), unions ``X | None``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _revive(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        return tuple(_revive(args[0], v) for v in value)
    if origin is dict:
        return {key: _revive(args[1], v) for key, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    return value
