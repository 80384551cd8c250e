"""Marks around what messages hold, so that a rendering shows who wrote which characters.

A mark is a half of a surrogate pair and two more that number the field: no text that can be encoded holds such, so no content
can forge one. White space at the ends of a field stays outside of its marks, and so do the tags of thinking that an answer
begins with: templates trim the one and look for the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from outgrow.streaming.render.unrenderable import UnrenderableError
from outgrow.streaming.sources.document import Message

Kind: TypeAlias = Literal["thinking", "content", "call"]

_OPEN, _CLOSE, _GENERATION_OPEN, _GENERATION_CLOSE = "\ud800", "\ud801", "\ud802", "\ud803"
GENERATION_START = _GENERATION_OPEN + "\udc00\udc00"
GENERATION_END = _GENERATION_CLOSE + "\udc00\udc00"
MAX_FIELDS = 1024 * 1024
_MARK = re.compile("([\ud800-\ud803])([\udc00-\udfff])([\udc00-\udfff])")
_TEXTS = ("content", "reasoning_content")
_THINK, _END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Field:
    """A text that is marked, not empty: the thinking or content of message number ``message``, or a text of a call in it."""

    message: int
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark in a rendering: before (``opens``) or after field number ``field``, -1 for what ``{% generation %}`` encloses."""

    start: int
    stop: int
    field: int
    opens: bool


def find_marks(text: str) -> Iterator[Mark]:
    """The marks of a rendering in order."""
    for found in _MARK.finditer(text):
        number = (ord(found[2]) - 0xDC00) * 1024 + ord(found[3]) - 0xDC00
        opens = found[1] in (_OPEN, _GENERATION_OPEN)
        yield Mark(found.start(), found.end(), number if found[1] in (_OPEN, _CLOSE) else -1, opens)


def without_marks(text: str) -> str:
    """A rendering as it is without marks."""
    return _MARK.sub("", text)


@dataclass
class MarkedMessages:
    """Messages whose texts are taken out, as ``fields``, and pairs of marks stand in their places.

    Two dialogues with equal ``keys`` (one a message) differ in their fields alone. ``unmarked`` are texts that were left
    where they stood. ``steady``: other dialogues are likely to have the same keys; those with tool calls do not.
    """

    messages: list[Message] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    unmarked: list[str] = field(default_factory=list)
    keys: list[tuple[str, ...]] = field(default_factory=list)
    steady: bool = True

    def filled(self) -> list[Message]:
        """The messages with each field between its marks."""
        texts = [own.text for own in self.fields]

        def fill(found: re.Match[str]) -> str:
            number = (ord(found[2]) - 0xDC00) * 1024 + ord(found[3]) - 0xDC00
            return found[0] + texts[number] if found[1] == _OPEN else found[0]

        return [_with_texts(message, lambda text: _MARK.sub(fill, text)) for message in self.messages]

    def _take(self, text: str, kind: Kind) -> str:
        """A pair of marks in place of a text."""
        number = len(self.fields)
        self.fields.append(Field(len(self.messages), kind, text))
        digits = chr(0xDC00 + number // 1024 % 1024) + chr(0xDC00 + number % 1024)
        return _OPEN + digits + _CLOSE + digits

    def _taken(self, text: str, kind: Kind) -> str:
        """A text with all of it but white space at its ends taken out."""
        core = text.strip()
        if len(core) == len(text):
            return self._take(text, kind) if text else ""
        if not core:
            return text
        start = len(text) - len(text.lstrip())
        return text[:start] + self._take(core, kind) + text[start + len(core) :]

    def _taken_answer(self, text: str) -> str:
        """A content that may begin with thinking between tags."""
        if _THINK in text[:100] and text.lstrip().startswith(_THINK) and (end := text.find(_END_THINK)) >= 0:
            start = text.index(_THINK) + len(_THINK)
            thinking = self._taken(text[start:end], "thinking")
            after = end + len(_END_THINK)
            return text[:start] + thinking + _END_THINK + self._taken(text[after:], "content")
        return self._taken(text, "content")

    def _add(self, message: Message) -> None:
        """Take the texts out of a message."""
        marked = dict(message)
        if "reasoning_content" in message:
            marked["reasoning_content"] = self._taken(message["reasoning_content"], "thinking")
        taken = self._taken_answer if message["role"] == "assistant" else lambda text: self._taken(text, "content")
        marked["content"] = taken(message["content"])
        if "tool_calls" in message:
            self.steady = False
            marked["tool_calls"] = [self._taken_call(call) for call in message["tool_calls"]]
        self._finish(marked, texts_in({key: value for key, value in marked.items() if key not in _TEXTS}))

    def _taken_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call with its function's name and the texts in its arguments taken out; its id and type templates look at."""
        function = call.get("function")
        if not isinstance(function, dict):
            return call
        changed = {name: _with_texts(function[name], lambda text: self._taken(text, "call")) for name in function}
        return {**call, "function": changed}

    def _finish(self, message: Message, unmarked: Iterable[str]) -> None:
        self.messages.append(message)
        self.unmarked += unmarked
        self.keys.append((message["role"], message["content"]) if len(message) == 2 else (json.dumps(message),))


def mark(messages: Sequence[Message], roles: frozenset[str] | None = None) -> MarkedMessages:
    """Messages with their texts taken out: all of them, or those of messages of ``roles``. Raises ``UnrenderableError``."""
    marked = MarkedMessages()
    for message in messages:
        if roles is None or message["role"] in roles:
            marked._add(message)
        else:
            marked.steady = False
            marked._finish(message, texts_in(message))
    if len(marked.fields) > MAX_FIELDS:
        raise UnrenderableError(f"it holds {len(marked.fields):,} texts; at most {MAX_FIELDS:,} can be told apart")
    return marked


def _with_texts(value: Any, change: Any) -> Any:
    """A JSON value with ``change`` made to each text in it, keys aside."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
