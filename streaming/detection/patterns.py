"""Glob patterns that match just some of the files of a folder: as few as their places allow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from outgrow.streaming.detection.files import suffix_of

_FEW = 12
"""Beyond so many patterns, all files of a suffix with some left out may be said in fewer."""
_SPECIAL = re.compile(r"[*?\[]")
_NO_TEXT = "\ufffd"
"""What stands in a name for bytes that are no UTF-8, however many."""


def patterns(chosen: Iterable[str], names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patterns of what to include, and of what to exclude, that match all ``chosen`` of ``names`` and no other of them."""
    wanted = frozenset(chosen)
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_suffix[suffix_of(name)].append(name)
    include: list[str] = []
    exclude: list[str] = []
    for suffix in sorted({suffix_of(name) for name in wanted}):
        found = list(_cover("", suffix, sorted(by_suffix[suffix]), wanted))
        others = [name for name in by_suffix[suffix] if name not in wanted]
        if len(found) > _FEW and len(others) < len(found):
            include.append(f"**/*{_literal(suffix)}")
            exclude += map(_literal, others)
        else:
            include += found
    return tuple(include), tuple(exclude)


def _cover(folder: str, suffix: str, names: Sequence[str], wanted: frozenset[str]) -> Iterable[str]:
    """Patterns below ``folder``; ``names`` are all files of the suffix there."""
    if all(name in wanted for name in names) and suffix:
        yield f"{_literal(folder)}**/*{_literal(suffix)}"
        return
    below: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, slash, _ = name[len(folder) :].partition("/")
        if slash:
            below[f"{folder}{head}/"].append(name)
        elif name in wanted:
            yield _literal(name)
    for deeper, inside in sorted(below.items()):
        if any(name in wanted for name in inside):
            yield from _cover(deeper, suffix, inside, wanted)


def _literal(text: str) -> str:
    """A pattern of that text alone; what is no text in it may be any character."""
    return _SPECIAL.sub(r"[\g<0>]", text).replace(_NO_TEXT, "*")
