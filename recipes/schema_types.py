"""What the schema's types allow: its fields one by one, and each type in plain words.

Error messages, the reference pages and the identity of a run all read the schema through this one view, so that what a message
calls allowed is what the schema allows.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from outgrow.recipes.schema.section import Mark, Section

_LIMITS = ("ge", "gt", "le", "lt", "pattern", "min_length")

_MEASURES = {Mark.SIZE: "a size such as 500 GB", Mark.RATE: "a rate such as 180 MB/s or 100 Mbit/s"}


@dataclass(frozen=True, kw_only=True)
class Type:
    """One type of the schema, unwrapped: ``options`` are its alternatives (one where it is no union), ``limits`` its bounds,
    ``marks`` what the schema says of its meaning."""

    options: tuple[Any, ...]
    limits: dict[str, Any] = field(default_factory=dict)
    marks: frozenset[Mark] = frozenset()

    @property
    def variants(self) -> dict[str, type[Section]]:
        """The sections of a tagged union by their ``kind``; empty for any other type."""
        if len(self.options) < 2 or not all(_is_section(option) for option in self.options):
            return {}
        return {tag(option): option for option in self.options}

    @property
    def section(self) -> type[Section] | None:
        return self.options[0] if len(self.options) == 1 and _is_section(self.options[0]) else None

    @property
    def item(self) -> Any:
        """The annotation of what a list (``tuple[X, ...]``) or a dict of the schema holds; None where it holds nothing."""
        origin, args = typing.get_origin(self.options[0]), typing.get_args(self.options[0])
        if origin is tuple and args[1:] == (Ellipsis,):
            return args[0]
        return args[1] if origin is dict else None

    @property
    def words(self) -> list[str]:
        """The words that a choice allows (``Literal``), among other things it may allow."""
        choices = [typing.get_args(option) for option in self.options if typing.get_origin(option) is Literal]
        return [word for choice in choices for word in choice if isinstance(word, str)]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One field that holds no section: ``key`` as written in YAML, lists as ``[]`` (``data.streams[].source.path``).

    ``variant`` is the ``kind`` of the nearest tagged union above, empty where there is none.
    """

    key: str
    variant: str
    holds: Type
    field: FieldInfo
    section: type[Section]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a key path leads in a schema: the section that holds its last key, and what that key holds.

    ``holds`` and ``field`` are None for a key that the section does not have.
    """

    path: tuple[str | int, ...]
    section: type[Section]
    holds: Type | None
    field: FieldInfo | None


def follow(root: type[Section], location: Sequence[int | str]) -> Place:
    """The place of one of pydantic's locations, whose ``path`` leaves out what is no key.

    That is: the kind of a tagged union, the branch of another union, an index into a list of fixed length.
    """
    place, holds = Place(path=(), section=root, holds=type_of(root), field=None), type_of(root)
    for part in location:
        if holds.variants:
            holds = type_of(holds.variants[str(part)])
            place = replace(place, holds=holds)
        elif holds.section is not None:
            field = fields(holds.section).get(str(part))
            place = Place(path=(*place.path, part), section=holds.section, holds=field and field_type(field), field=field)
            if place.holds is None:
                break
            holds = place.holds
        elif holds.item is not None:
            holds = type_of(holds.item)
            place = replace(place, path=(*place.path, part), holds=holds)
        else:
            break
    return place


def type_of(annotation: Any, metadata: Sequence[Any] = ()) -> Type:
    """The type of an annotation: ``Annotated``, ``None`` and secrets are unwrapped, bounds are gathered."""
    metadata = [*metadata]
    while typing.get_origin(annotation) is Annotated:
        annotation, *extra = typing.get_args(annotation)
        metadata += extra
    limits = {name: value for mark in metadata for name, value in _limits(mark)}
    marks = frozenset(mark for mark in metadata if isinstance(mark, Mark))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = tuple(a for a in typing.get_args(annotation) if a is not type(None) and a is not SecretStr)
        if len(options) == 1:
            inner = type_of(options[0])
            return Type(options=inner.options, limits=limits | inner.limits, marks=marks | inner.marks)
        return Type(options=options, limits=limits, marks=marks)
    return Type(options=(annotation,), limits=limits, marks=marks)


def field_type(info: FieldInfo) -> Type:
    return type_of(info.annotation, info.metadata)


def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by the key that YAML uses."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def tag(section: type[Section]) -> str:
    """The ``kind`` of one variant of a tagged union."""
    return str(typing.get_args(section.model_fields["kind"].annotation)[0])


def leaves(section: type[Section], key: str = "", variant: str = "") -> Iterator[Leaf]:
    """Every leaf of a schema, depth first, each variant of a tagged union in turn."""
    for name, info in fields(section).items():
        here = f"{key}.{name}".removeprefix(".")
        kind = field_type(info)
        if kind.section is None and not kind.variants and kind.item is not None and _is_section(kind.item):
            here, kind = f"{here}[]", type_of(kind.item)
        if kind.section is not None:
            yield from leaves(kind.section, here, variant)
        elif kind.variants:
            for name_of_variant, option in kind.variants.items():
                yield from leaves(option, here, name_of_variant)
        else:
            yield Leaf(key=here, variant=variant, holds=kind, field=info, section=section)


def describe(kind: Type, description: str = "") -> str:
    """What a type allows, in plain words: ``a whole number, at least 1``.

    Of a text with a pattern the field's own ``description`` says it: its first clause.
    """
    if kind.variants:
        return f"a section with kind: {' | '.join(kind.variants)}"
    if "pattern" in kind.limits:
        clause = re.split(r"[;.:]\s", f"{description} ", maxsplit=1)[0].strip().rstrip(".").replace("`", "")
        return clause[:1].lower() + clause[1:]
    return " or ".join(dict.fromkeys(_describe(option, kind.limits) for option in kind.options))


def _describe(annotation: Any, limits: dict[str, Any]) -> str:
    kind = type_of(annotation)
    annotation, limits = kind.options[0], limits | kind.limits
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in args)
    if origin is tuple:
        count = "" if args[1:] == (Ellipsis,) else f"{len(args)} "
        many = {str: "texts", float: "numbers"}.get(args[0], "items")
        return f"a list of {count}{many}" + _bounds(limits)
    if origin is dict:
        return "key: value pairs"
    for mark in kind.marks & _MEASURES.keys():
        return _MEASURES[mark]
    if _is_section(annotation):
        return f"a section with {', '.join(fields(annotation))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation] + _bounds(limits)


def _bounds(limits: dict[str, Any]) -> str:
    if limits.get("min_length") == 1:
        return " that is not empty"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{word} {limits[name]:.12g}" for name, word in words.items() if name in limits]
    return f", {' and '.join(parts)}" if parts else ""


def _limits(mark: Any) -> Iterator[tuple[str, Any]]:
    for name in _LIMITS:
        value = getattr(mark, name, None)
        if value is not None:
            yield name, value
    for inner in mark.metadata if isinstance(mark, FieldInfo) else ():
        yield from _limits(inner)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
