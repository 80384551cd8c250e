"""A look at one file: which kind of source reads it, and what there is to say of it; bounded in bytes, records and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import yaml

from outgrow.streaming.detection.files import (
    ADVICE,
    IN_DOUBT,
    MAX_RECORDS,
    SAMPLE_BYTES,
    SAMPLE_CHARS,
    SHORT_VALUE,
    WHOLE_BYTES,
    Look,
    kind_by_name,
    suffix_of,
)
from outgrow.streaming.detection.record_looks import json_look, jsonl_look, parquet_look
from outgrow.streaming.detection.whole_looks import likely_russian, whole_look
from outgrow.streaming.sources.document import BadRecordError
from outgrow.streaming.sources.encoding import decode
from outgrow.streaming.sources.yaml_nodes import read_documents


def look(path: Path, name: str) -> Look:
    """What the file is. Errors of the file become its ``problem``."""
    kind = kind_by_name(name)
    if not kind:
        return Look(name=name, kind="", problem=_unread(path, name))
    if not path.stat().st_size:
        return Look(name=name, kind=kind, problem="it is empty")
    try:
        return _LOOKS[kind](path, name) if kind in _LOOKS else whole_look(path, name, kind)
    except BadRecordError as bad:
        return Look(name=name, kind=kind, problem=f"line {bad.line}: {bad}" if bad.line else str(bad))


def _unread(path: Path, name: str) -> str:
    suffix = suffix_of(name).lower()
    if suffix in ADVICE:
        return f"{suffix} is not read: {ADVICE[suffix]}"
    with open(path, "rb") as file:
        data = file.read(SAMPLE_BYTES)
    try:
        decode(_whole_lines(data, path), "auto")
    except BadRecordError:
        return "no text of a kind that is read"
    return (
        f"it looks like text: a stream of kind text with include: ['**/*{suffix}'] reads it" if suffix else "it looks like text"
    )


def _text(path: Path, name: str) -> Look:
    with open(path, "rb") as file:
        data = _whole_lines(file.read(SAMPLE_BYTES), path)
    kind = kind_by_name(name)
    try:
        text, encoding = decode(data, "auto")
    except BadRecordError as bad:
        return _in_doubt(name, kind, data, bad)
    facts = Counter({"front matter": int(kind == "markdown" and text.startswith("---\n"))})
    return Look(name=name, kind=kind, encoding=encoding, text=text[:SAMPLE_CHARS], facts=facts)


def _in_doubt(name: str, kind: str, data: bytes, bad: BadRecordError) -> Look:
    return Look(name=name, kind=kind, encoding=IN_DOUBT, likely_encoding=likely_russian(data), problem=str(bad))


def _whole_lines(data: bytes, path: Path) -> bytes:
    """``data`` up to its last line end where the file goes on: a letter may be cut in two."""
    return data[: data.rfind(b"\n") + 1] or data if len(data) < path.stat().st_size else data


def _yaml(path: Path, name: str) -> Look:
    if path.stat().st_size > WHOLE_BYTES:
        return Look(name=name, kind="yaml")
    data = path.read_bytes()
    try:
        text, encoding = decode(data, "auto")
    except BadRecordError as bad:
        return _in_doubt(name, "yaml", data, bad)
    facts: Counter[str] = Counter()
    misfits: list[str] = []
    num_records = num_fit = 0
    for item in islice(read_documents(text), MAX_RECORDS):
        num_records += 1
        if isinstance(item, BadRecordError):
            misfits.append(f"{name}:{item.line}: {item}")
        elif item.root is not None:
            num_fit += 1
            facts.update(_yaml_facts(item.root))
    return Look(
        name=name,
        kind="yaml",
        encoding=encoding,
        num_records=num_records,
        num_fit=num_fit,
        num_misfits=len(misfits),
        misfit=next(iter(misfits), ""),
        facts=facts,
    )


def _yaml_facts(root: yaml.Node) -> Iterator[str]:
    """``key:K`` for a key whose value is short; of a document that is but a list ``K`` of mappings, ``only:K`` and of each item
    ``item``, ``item key:K``."""
    yield from (f"key:{key}" for key in _short_keys(root))
    if isinstance(root, yaml.MappingNode) and len(root.value) == 1:
        (key, value) = root.value[0]
        items = value.value if isinstance(value, yaml.SequenceNode) else []
        if isinstance(key, yaml.ScalarNode) and items and all(isinstance(item, yaml.MappingNode) for item in items):
            yield f"only:{key.value}"
            for item in items[:MAX_RECORDS]:
                yield "item"
                yield from (f"item key:{key}" for key in _short_keys(item))


def _short_keys(node: yaml.Node) -> list[str]:
    if not isinstance(node, yaml.MappingNode):
        return []
    pairs = [(key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    return [key for key, value in pairs if isinstance(value, yaml.ScalarNode) and len(value.value) <= SHORT_VALUE]


_LOOKS: dict[str, Callable[[Path, str], Look]] = {
    "jsonl": jsonl_look,
    "json": json_look,
    "parquet": parquet_look,
    "text": _text,
    "markdown": _text,
    "yaml": _yaml,
}
"""How files are looked at of which not all need be read."""
