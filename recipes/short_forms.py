"""The short form of a section that has kinds: ``clean: [nfc]`` for ``clean: [{kind: nfc}]``, ``parallel: auto`` likewise; and a
section without its kind where one kind is the usual one: ``optimizer: {learning_rate: 0.001}`` is AdamW."""

from __future__ import annotations

from typing import Any

from outgrow.recipes.schema.section import Section
from outgrow.recipes.schema_types import Type, field_type, fields, type_of


def expand(data: Any, root: type[Section]) -> Any:
    """``data`` (plain YAML data) with every section of a tagged union under its kind, whether that was given or not."""
    return _expand(data, type_of(root))


def _expand(data: Any, holds: Type, required: bool = False) -> Any:
    if holds.variants:
        if isinstance(data, str):
            return {"kind": data}
        usual = _usual(holds) if required else ""
        if usual and isinstance(data, dict) and "kind" not in data:
            data = {"kind": usual, **data}
        section = holds.variants.get(str(data.get("kind"))) if isinstance(data, dict) else None
    else:
        section = holds.section
    if section is not None and isinstance(data, dict):
        known = fields(section)
        return {
            key: _expand(value, field_type(known[key]), known[key].is_required()) if key in known else value
            for key, value in data.items()
        }
    if holds.item is not None and isinstance(data, list):
        return [_expand(value, type_of(holds.item)) for value in data]
    return data


def _usual(holds: Type) -> str:
    """The kind that is meant where a section that must be given names none; empty where there is no such kind."""
    kinds = [kind for kind, section in holds.variants.items() if not section.model_fields["kind"].is_required()]
    return kinds[0] if len(kinds) == 1 else ""
