"""Streams that would read what was looked at: a section of the recipe each, with why beside every line."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from outgrow.recipes.schema.sources import PreferenceShape, Shape, TextShape
from outgrow.streaming.detection.files import IN_DOUBT, Look, source_of, suffix_of
from outgrow.streaming.detection.patterns import patterns
from outgrow.streaming.detection.signs import clean_steps

_NAMES = {
    "text": "texts",
    "markdown": "markdown",
    "epub": "epub-books",
    "fb2": "fb2-books",
    "docx": "documents",
    "pdf": "pdf",
    "transcript": "transcripts",
    "yaml": "scenes",
    "messages": "dialogues",
    "sharegpt": "dialogues",
    "alpaca": "questions",
    "preference": "pairs",
}
_TAGS = {"yaml": "<YAML>", "transcript": "<TRANSCRIPT>"}
_SHAPES = {
    "messages": "lists of messages with role and content",
    "sharegpt": "lists of messages with from and value",
    "alpaca": "a question and an answer",
    "preference": "a chosen and a rejected answer",
    "text": "texts",
}
_MOST = 0.8
"""A key of YAML documents that so many of them have is kept as metadata."""
_KEPT_KEYS = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of the section, ``source.include`` for one within another, with why it is proposed."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One stream; ``notes`` are what the files of it hold that the reader should know."""

    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.settings[0].value)


@dataclass
class _Group:
    """Files that one stream reads: those looked at, and the names of all."""

    kind: str
    shape: Shape | None
    records: str
    looks: list[Look] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def propose(looks: Sequence[Look], names: Sequence[str], others: dict[str, str], path: str) -> list[Proposal]:
    """Streams for the files of a folder that the recipe calls ``path``.

    ``names`` are all files of the folder; ``others`` gives for each file that was not looked at one that stands for it.
    """
    groups = _groups(looks, others)
    taken: set[str] = set()
    found = []
    for group in groups:
        name = _unique(_name(group, groups, path), taken)
        found.append(Proposal(settings=tuple(_settings(group, name, names, path)), notes=tuple(_notes(group))))
    return found


# --- groups -----------------------------------------------------------------------------------------------------------


def _groups(looks: Sequence[Look], others: dict[str, str]) -> list[_Group]:
    """Files of one kind, shape and place of records together; a file that could not be read goes with most of its kind."""
    groups: dict[tuple[str, Shape | None, str], _Group] = {}
    of_file: dict[str, _Group] = {}
    unsure = []
    for look in looks:
        if look.problem and look.shape is None and look.kind in ("json", "jsonl", "parquet"):
            unsure.append(look)
        elif look.kind:
            group = groups.setdefault((look.kind, look.shape, look.records), _Group(look.kind, look.shape, look.records))
            of_file[look.name] = group
            group.looks.append(look)
    for look in unsure:
        same = [group for group in groups.values() if group.kind == look.kind]
        if same:
            of_file[look.name] = max(same, key=lambda group: len(group.looks))
            of_file[look.name].looks.append(look)
    for look in looks:
        if look.name in of_file:
            of_file[look.name].names.append(look.name)
    for name, stand_in in others.items():
        if stand_in in of_file:
            of_file[stand_in].names.append(name)
    return list(groups.values())


def _name(group: _Group, groups: Sequence[_Group], path: str) -> str:
    """The folder that the files of the group share, where they have it to themselves; else what they are."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in group.names}
    (top,) = tops if len(tops) == 1 else ("",)
    alone = not any(name.startswith(f"{top}/") for other in groups if other is not group for name in other.names)
    if top and alone and slug(top):
        return slug(top)
    if len(groups) == 1 and path:
        return path
    kind = group.shape.kind if group.shape is not None else group.kind
    return _NAMES.get(kind, group.kind)


def slug(text: str) -> str:
    """``text`` as a name of a stream or source: lower-case Latin letters, digits, ``-`` and ``_``; perhaps nothing is left."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:40].rstrip("-_")


def _unique(name: str, taken: set[str]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name[:36]}-{number}", number + 1
    taken.add(unique)
    return unique


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(group: _Group, name: str, names: Sequence[str], path: str) -> Iterator[Setting]:
    suffixes = ", ".join(sorted({suffix_of(name) for name in group.names}))
    yield Setting(key="name", value=name)
    yield Setting(key="source.kind", value=group.kind, why=f"{counted(len(group.names), 'file')}: {suffixes}")
    yield Setting(key="source.path", value=path)
    if len(names) > 1:
        include, exclude = patterns(group.names, names)
        if exclude or not _is_default(group, include, names):
            yield Setting(key="source.include", value=list(include))
        if exclude:
            yield Setting(key="source.exclude", value=list(exclude), why="they are something else")
    yield from _shape_settings(group)
    yield from _encoding(group)
    yield from _yaml_settings(group)
    if problems := _problems(group):
        yield Setting(key="source.on_error", value="quarantine", why=problems)
    texts = [look.text for look in group.looks if look.text]
    steps = list(clean_steps(group.kind, texts)) if group.kind != "yaml" else []
    if steps:
        yield Setting(key="clean", value=[step for step, _ in steps], why="; ".join(why for _, why in steps if why))
    if group.kind in _TAGS:
        yield Setting(key="tag", value=_TAGS[group.kind], why="a token that tells what follows; remove it if you need none")
    if group.shape is not None and not isinstance(group.shape, TextShape):
        pair = isinstance(group.shape, PreferenceShape)
        yield Setting(key="split", value="never", why=f"a {'pair' if pair else 'dialogue'} lies whole in one row")
        too_long = ("stop", "one longer than a row stops the build; drop leaves it out") if pair else ("split", "into rows")
        yield Setting(key="too_long", value=too_long[0], why=too_long[1])


def _is_default(group: _Group, include: tuple[str, ...], names: Sequence[str]) -> bool:
    """Whether the patterns that hold where none are given match the same files."""
    suffixes = tuple(pattern.removeprefix("**/*") for pattern in source_of(group.kind).include)
    return {name for name in names if name.endswith(suffixes)} == set(group.names)


def _shape_settings(group: _Group) -> Iterator[Setting]:
    if group.shape is None:
        return
    looked, fit = sum(look.num_records for look in group.looks), sum(look.num_fit for look in group.looks)
    if group.records:
        yield Setting(key="source.records", value=group.records, why="the list of records in each file")
    why = f"{fit:,} of {counted(looked, 'record')} looked at are {_SHAPES[group.shape.kind]}"
    yield Setting(
        key="source.shape", value={"kind": group.shape.kind, **group.shape.model_dump(exclude_defaults=True)}, why=why
    )


def _encoding(group: _Group) -> Iterator[Setting]:
    """The encoding, where files leave doubt, and all of them and all others seem to be in the same."""
    doubtful = [look for look in group.looks if look.encoding == IN_DOUBT]
    telling = [look for look in group.looks if look.encoding == IN_DOUBT or not look.text.isascii()]
    encodings = {look.likely_encoding or look.encoding for look in telling}
    if doubtful and len(encodings) == 1 and IN_DOUBT not in encodings:
        why = f"{len(doubtful)} of {counted(len(group.looks), 'file')} leave doubt, but seem to be in it; check that"
        yield Setting(key="source.encoding", value=encodings.pop(), why=why)


def _yaml_settings(group: _Group) -> Iterator[Setting]:
    if group.kind != "yaml":
        return
    facts: Counter[str] = sum((look.facts for look in group.looks), Counter())
    documents = sum(look.num_fit for look in group.looks)
    only = [key.removeprefix("only:") for key, count in facts.items() if key.startswith("only:") and count >= _MOST * documents]
    prefix, whole = ("item key:", facts["item"]) if only and "." not in only[0] else ("key:", documents)
    if prefix != "key:":
        why = f"the documents are but a list of {facts['item']:,} mappings; remove it to keep them whole"
        yield Setting(key="source.records", value=only[0], why=why)
    keys = [key.removeprefix(prefix) for key, count in facts.items() if key.startswith(prefix) and count >= _MOST * whole]
    if keys and whole:
        yield Setting(key="source.keep", value=keys[:_KEPT_KEYS], why=f"short values that most of {whole:,} scenes have")


def _problems(group: _Group) -> str:
    """What does not fit, in a line; empty where all does."""
    bad = [look for look in group.looks if look.problem and not look.facts["scans"] and look.encoding != IN_DOUBT]
    doubtful = [look for look in group.looks if look.encoding == IN_DOUBT] if not list(_encoding(group)) else []
    misfits = sum(look.num_misfits for look in group.looks)
    parts = []
    if misfits:
        first = next(look.misfit for look in group.looks if look.num_misfits)
        looked = sum(look.num_records for look in group.looks)
        parts.append(f"{misfits:,} of {counted(looked, 'record')} looked at do not fit; the first: {first}")
    for looks, what in ((bad, "cannot be read"), (doubtful, "may be in several encodings")):
        if looks:
            parts.append(f"{counted(len(looks), 'file')} {what}; the first: {looks[0].name}: {looks[0].problem}")
    return "; ".join(parts)


def _notes(group: _Group) -> Iterator[str]:
    """What there is to know beside the settings."""
    facts: Counter[str] = sum((look.facts for look in group.looks), Counter())
    looked = len(group.looks)
    if facts["scans"]:
        scans = [look for look in group.looks if look.facts["scans"]]
        yield f"{facts['scans']} of {looked} files are scans without text, counted as empty; the first: {scans[0].name}"
    if facts["pages without text"]:
        yield f"{facts['pages without text']:,} pages of other files have no text"
    if facts["speakers"]:
        speaking = sum(bool(look.facts["speakers"]) for look in group.looks)
        yield f"{speaking} of {looked} files name speakers; source.speakers: drop leaves them out"
    if facts["front matter"]:
        yield f"{facts['front matter']} of {looked} files begin with front matter, which becomes metadata"
    encodings: dict[str, int] = defaultdict(int)
    for look in group.looks:
        encodings[look.encoding.removesuffix("-sig")] += 1
    if len(encodings) > 1 or set(encodings) - {"utf-8"}:
        yield "encodings: " + ", ".join(f"{encoding} {count}" for encoding, count in sorted(encodings.items()))


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
