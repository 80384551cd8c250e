"""Strict YAML as plain data, with the place of every key.

Only PyYAML's composer is used, which builds nodes and no objects. What YAML leaves open is closed: duplicate keys, tags,
aliases and several documents in a file are refused; ``yes``, ``no``, ``010:30`` and dates are text; ``1e-3`` is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from outgrow.errors import Problem, RecipeError, SiteError

KeyPath: TypeAlias = tuple[str | int, ...]

_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"null|~|")
_BOOL = re.compile(r"true|false")
_INT = re.compile(r"[-+]?[0-9][0-9_]{0,30}")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]{1,3})?")


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the rules of this module and refuses aliases."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not used here", problem_mark=self.get_mark())
        return super().compose_node(parent, index)


for _kind, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern.pattern})\Z"), None)


@dataclass(frozen=True, kw_only=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and where each key of it stands (``file:line``)."""

    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The place of ``path``, or of the nearest key above it that is there."""
        return next(self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places)


def key_text(path: KeyPath) -> str:
    """A key path as people write it: ``data.streams[0].name``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def key_path(key: str) -> KeyPath:
    """``streams[0].name`` and ``streams.0.name`` as a key path."""
    return tuple(int(part) if part.isdecimal() else part for part in key.replace("[", ".").replace("]", "").split(".") if part)


def read(path: Path, error: type[RecipeError] | type[SiteError]) -> Document:
    """The document of a file, whose top is a mapping. Raises ``error`` with every problem that YAML itself has."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise error("there is no such file", where=str(path)) from None
    except OSError as failure:
        raise error(f"cannot be read: {failure.strerror}", where=str(path)) from None
    except UnicodeDecodeError as failure:
        raise error(f"is not UTF-8 text (byte {failure.start})", where=str(path)) from None
    document, problems = parse(text, str(path))
    if not problems and not isinstance(document.data, dict):
        given = "is empty" if document.data is None else "holds a list or a single value"
        problems = [Problem(where=str(path), key="", message=f"the file {given}; allowed: a mapping of key: value")]
    if problems:
        raise error(problems)
    return document


def parse(text: str, name: str) -> tuple[Document, list[Problem]]:
    """The document of ``text`` and what is wrong with it; places read ``name:line``."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        builder = _Builder(name)
        data = None if root is None else builder.build(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        words = f"{error.context}, {error.problem}" if f"{error.problem}".startswith("but ") else error.problem
        return Document(data=None), [Problem(where=where, key="", message=f"not valid YAML: {words}")]
    except yaml.YAMLError as error:
        return Document(data=None), [Problem(where=name, key="", message=f"not valid YAML: {str(error).splitlines()[0]}")]
    except RecursionError:
        return Document(data=None), [Problem(where=name, key="", message="not valid YAML: nested too deeply")]
    return Document(data=data, places={(): f"{name}:1", **builder.places}), builder.problems


def strings(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every text value in plain data, with its key path."""
    if isinstance(data, str):
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from strings(value, (*path, key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from strings(value, (*path, index))


class _Builder:
    """Turns composed nodes into plain data, noting places and problems along the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if len(path) > _MAX_DEPTH:
            return self._refuse(node, path[:1], f"nested more than {_MAX_DEPTH} deep")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self._entry(item, item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        return self._refuse(node, path, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; write plain values")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key_node.tag != f"{_TAG}str":
                self._refuse(key_node, path, f"the key {key!r} is not text; put it in quotes")
            elif key in result:
                self._refuse(key_node, (*path, key), f"given twice; first on line {first_line[key]}")
            else:
                first_line[key] = line
                result[key] = self._entry(key_node, value_node, (*path, key))
        return result

    def _entry(self, place: yaml.Node, value: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = f"{self.name}:{place.start_mark.line + 1}"
        return self.build(value, path)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text: str = node.value
        match node.tag.removeprefix(_TAG):
            case "null" if _NULL.fullmatch(text):
                return None
            case "bool" if _BOOL.fullmatch(text):
                return text == "true"
            case "int" if _INT.fullmatch(text):
                return int(text.replace("_", ""))
            case "float" if _FLOAT.fullmatch(text) and math.isfinite(value := float(text.replace("_", ""))):
                return value
            case "str" if not any("\ud800" <= letter <= "\udfff" for letter in text):
                return text
            case tag if tag in ("null", "bool", "int", "float", "str"):
                return self._refuse(node, path, f"{text!r} is not a value that can be used")
        return self._refuse(node, path, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; write plain values")

    def _refuse(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(where=f"{self.name}:{node.start_mark.line + 1}", key=key_text(path), message=message))
