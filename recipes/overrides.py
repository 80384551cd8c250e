"""Overrides ``key.path=value``: what the command line changes in a recipe before it is checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from outgrow.errors import Problem
from outgrow.recipes.yaml_marks import Document, KeyPath, key_path, key_text, parse

_KEY = re.compile(r"[^.\[\]=\s]+(?:\.[^.\[\]=\s]+|\[\d{1,6}\]){0,20}")


def apply(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """The document with each ``key.path=value`` set in turn, values parsed as YAML, and what is wrong with the overrides.

    List items go by ``streams[0]`` or ``streams.0``. An overridden key's place reads ``override 'key.path=value'``.
    """
    data, places, problems = copy.deepcopy(document.data), dict(document.places), list[Problem]()
    for override in overrides:
        place = f"override '{override}'"
        key, separator, text = override.partition("=")
        if not separator or not _KEY.fullmatch(key):
            problems.append(Problem(where=place, key="", message="allowed: key.path=value, such as batch.rows=8"))
            continue
        value, wrong = parse(text, place)
        if wrong:
            problems.append(Problem(where=place, key="", message=wrong[0].message))
            continue
        path = key_path(key)
        message = _assign(data, path, value.data)
        if message:
            problems.append(Problem(where=place, key=key_text(path), message=message))
            continue
        places = {known: where for known, where in places.items() if known[: len(path)] != path}
        for depth in range(1, len(path)):
            places.setdefault(path[:depth], place)
        places[path] = place
    return Document(data=data, places=places), problems


def _assign(data: Any, path: KeyPath, value: Any) -> str:
    """Set ``path`` in place; sections on the way are made where they are missing. Says what is wrong, or nothing."""
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(data, list):
            if not isinstance(part, int) or part >= len(data):
                return f"{key_text(path[:depth])} holds {len(data)}; allowed: an index below {len(data)}"
            if not last and not isinstance(data[part], dict | list):
                data[part] = {}
        else:
            part = str(part)
            if not last and not isinstance(data.get(part), dict | list):
                data[part] = {}
        if last:
            data[part] = value
        else:
            data = data[part]
    return ""
