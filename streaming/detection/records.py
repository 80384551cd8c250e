"""Guesses of the shape that records have: dialogues, questions and answers, preference pairs, texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outgrow.recipes.schema.sources import AlpacaShape, MessagesShape, PreferenceShape, Shape, ShareGptShape, TextShape
from outgrow.streaming.sources.document import BadRecordError
from outgrow.streaming.sources.shapes import document

_PROMPTS = ("prompt", "question", "instruction", "input")
_QUESTIONS = ("instruction", "question", "prompt", "query")
_CONTEXTS = ("input", "context")
_ANSWERS = ("output", "response", "answer", "completion")
_TEXTS = ("text", "content", "body", "document", "raw_content", "article")
_LONG_TEXT = 200
"""Characters from which on the longest text of a record may be what it is about, whatever its key."""
_LIST_DEPTH = 3
"""Keys within each other that are followed to find the list of records of a JSON file."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """What most of some records are; ``num_fit`` of ``num_records`` fit ``shape``.

    ``num_misfits`` of the others are not merely empty; ``misfit`` is the first of them. ``text`` is what those of the shape
    ``text`` hold.
    """

    shape: Shape | None
    num_records: int
    num_fit: int
    num_misfits: int
    misfit: str
    text: str = ""


def of_records(found: Sequence[tuple[str, Any]]) -> Records:
    """What the records are, each given by its name and value; a value may be the error that it could not be read."""
    votes = Counter(shape for _, value in found if (shape := guess(value)) is not None)
    shape = votes.most_common(1)[0][0] if votes else None
    misfits: list[str] = []
    texts: list[str] = []
    for name, value in found:
        try:
            if isinstance(value, BadRecordError):
                raise value
            if shape is not None:
                made = document(shape, value, name)
                texts.append(made.content if isinstance(made.content, str) else "")
        except BadRecordError as bad:
            if bad.reason != "empty":
                misfits.append(f"{name}: {bad}")
    return Records(
        shape=shape,
        num_records=len(found),
        num_fit=len(texts),
        num_misfits=len(misfits),
        misfit=next(iter(misfits), ""),
        text="\n".join(texts),
    )


def guess(record: Any) -> Shape | None:
    """The shape that a record seems to have."""
    if isinstance(record, list):
        return _of_turns(record, "messages")
    if not isinstance(record, dict):
        return None
    if "chosen" in record and "rejected" in record:
        return PreferenceShape(kind="preference", prompt=_first(record, _PROMPTS, (str, list)) or "prompt")
    for key, value in record.items():
        turns = _of_turns(value, key)
        if turns is not None:
            return turns
    question, answer = _first(record, _QUESTIONS, (str,)), _first(record, _ANSWERS, (str,))
    if question and answer:
        return AlpacaShape(
            kind="alpaca", instruction=question, output=answer, input=_first(record, _CONTEXTS, (str,)) or "input"
        )
    text = _first(record, _TEXTS, (str,)) or _longest_text(record)
    return TextShape(field=text) if text else None


def list_within(value: Any, depth: int = _LIST_DEPTH) -> tuple[str, list[Any]]:
    """The longest list of objects within an object, and its key path; an empty path where there is none."""
    best: tuple[str, list[Any]] = ("", [])
    for key, item in value.items() if isinstance(value, dict) and depth else ():
        if not isinstance(key, str) or "." in key or not key:
            continue
        if isinstance(item, list) and item and all(isinstance(entry, dict | list) for entry in item[:10]):
            found = (key, item)
        else:
            below, entries = list_within(item, depth - 1)
            found = (f"{key}.{below}" if below else "", entries)
        if found[0] and len(found[1]) > len(best[1]):
            best = found
    return best


def _of_turns(value: Any, key: str) -> Shape | None:
    """The shape of a record that has such a list of messages under ``key``."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    if "role" in value[0]:
        return MessagesShape(kind="messages", field=key)
    if "from" in value[0] and "value" in value[0]:
        return ShareGptShape(kind="sharegpt", field=key)
    return None


def _first(record: dict[str, Any], keys: tuple[str, ...], kinds: tuple[type, ...]) -> str:
    return next((key for key in keys if isinstance(record.get(key), kinds)), "")


def _longest_text(record: dict[str, Any]) -> str:
    texts = {key: len(value) for key, value in record.items() if isinstance(value, str) and len(value) >= _LONG_TEXT}
    return max(texts, key=lambda key: texts[key]) if texts else ""
