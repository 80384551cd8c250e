"""What pydantic found wrong, in plain words: file:line, the key as people write it, what was given and what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from outgrow.errors import Problem
from outgrow.recipes.schema.section import BROKEN_RULES, Section
from outgrow.recipes.schema_types import Place, Type, describe, fields, follow, leaves
from outgrow.recipes.yaml_marks import Document, KeyPath, key_path, key_text


def explain(error: ValidationError, document: Document, root: type[Section]) -> list[Problem]:
    """One problem a key."""
    found: dict[KeyPath, Problem] = {}
    for detail in error.errors(include_url=False):
        for path, message in _explain_one(detail, root):
            found.setdefault(path, Problem(where=document.where(path), key=key_text(path), message=message))
    # pydantic also calls a list too short when its only item is wrong: a problem below a key speaks for the key.
    kept = [path for path in found if not any(other != path and other[: len(path)] == path for other in found)]
    return [found[path] for path in kept]


def in_order(problems: Iterable[Problem], document: Document) -> list[Problem]:
    """The problems in the order of the file, the first one alone where several have the same key and place."""
    first: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first.setdefault((problem.where, problem.key), problem)
    order = {place: index for index, place in enumerate(dict.fromkeys(document.places.values()))}
    return sorted(first.values(), key=lambda problem: order.get(problem.where, len(order)))


def show(value: Any) -> str:
    """A given value, short, as it looks in YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain_one(detail: ErrorDetails, root: type[Section]) -> Iterator[tuple[KeyPath, str]]:
    place = follow(root, detail["loc"])
    context = detail.get("ctx", {})
    if detail["type"] == BROKEN_RULES:
        for key, message in context["broken"]:
            yield place.path + key_path(key), message
    elif detail["type"] == "value_error":
        yield place.path, str(context["error"])
    elif place.holds is None or place.field is None:
        yield place.path, _unknown(place, root)
    elif detail["type"] == "missing" and place.path[-1] == detail["loc"][-1]:
        yield place.path, f"missing; allowed: {describe(place.holds, place.field.description or '')}"
    elif detail["type"] == "union_tag_not_found":
        yield (*place.path, "kind"), f"missing; allowed: {' | '.join(place.holds.variants)}"
    elif detail["type"] == "union_tag_invalid":
        yield (*place.path, "kind"), _wrong_kind(str(context["tag"]), place.holds)
    else:
        allowed = describe(place.holds, place.field.description or "")
        yield place.path, f"given {show(detail['input'])}; allowed: {allowed}{_nearest(detail['input'], place.holds.words)}"


def _unknown(place: Place, root: type[Section]) -> str:
    key, allowed = str(place.path[-1]), list(fields(place.section))
    near = difflib.get_close_matches(key, allowed, n=1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    here = re.sub(r"\[\d+\]", "[]", key_text(place.path))
    known = [leaf for leaf in leaves(root) if leaf.key.endswith(f".{key}")]
    if kinds := [leaf.variant for leaf in known if leaf.key == here]:
        return f"unknown key for this kind; it belongs to kind: {' | '.join(kinds)}"
    if known:
        return f"unknown key; did you mean {' or '.join(dict.fromkeys(leaf.key for leaf in known))}?"
    return f"unknown key; allowed: {', '.join(allowed)}"


_MEANT = {
    "qlora": ("lora", "{kind: lora, base: nf4}"),
    "dora": ("lora", "{kind: lora, dora: true}"),
    "rslora": ("lora", "{kind: lora, scaling: rslora}"),
    "hsdp": ("fsdp2", "{kind: fsdp2, shard: node}"),
    "deepspeed": ("zero", "{kind: zero}"),
    **{f"zero{stage}": ("zero", f"{{kind: zero, stage: {stage}}}") for stage in (1, 2, 3)},
    "fp16": ("bf16", "bf16, which has the range of fp32"),
    "float16": ("bf16", "bf16, which has the range of fp32"),
}
"""Words of the field that are no kinds or values here: what allows them, and how they are written."""


def _wrong_kind(given: str, kind: Type) -> str:
    return f"given {show(given)}; allowed: {' | '.join(kind.variants)}{_nearest(given, list(kind.variants))}"


def _nearest(given: Any, words: Sequence[str]) -> str:
    allows, written = _MEANT.get(str(given).lower().replace("-", ""), ("", ""))
    if allows in words:
        return f"; did you mean {written}?"
    near = difflib.get_close_matches(given, words, n=1, cutoff=0.7) if isinstance(given, str) else []
    return f"; did you mean {near[0]}?" if near else ""
