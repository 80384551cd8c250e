"""The short form of a section that has kinds: ``clean: [nfc]`` for ``clean: [{kind: nfc}]``, ``parallel: auto`` likewise."""

from __future__ import annotations

from typing import Any

from outgrow.recipes.schema.section import Section
from outgrow.recipes.schema_types import Type, field_type, fields, type_of


def expand(data: Any, root: type[Section]) -> Any:
    """``data`` (plain YAML data) with a text in place of a tagged union of the schema as the section of that kind."""
    return _expand(data, type_of(root))


def _expand(data: Any, holds: Type) -> Any:
    if holds.variants:
        if isinstance(data, str):
            return {"kind": data}
        section = holds.variants.get(str(data.get("kind"))) if isinstance(data, dict) else None
    else:
        section = holds.section
    if section is not None and isinstance(data, dict):
        known = fields(section)
        return {key: _expand(value, field_type(known[key])) if key in known else value for key, value in data.items()}
    if holds.item is not None and isinstance(data, list):
        return [_expand(value, type_of(holds.item)) for value in data]
    return data
