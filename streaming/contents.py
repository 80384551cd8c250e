"""What the build does with a document's content before it is rendered: its texts cleaned, joined and digested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from outgrow.streaming.sources.document import Content, Dialogue, Document, Message, PreferencePair

Clean: TypeAlias = Callable[[str], tuple[str, tuple[int, ...]]]
"""The cleaned text, and the changes that each step made."""

_TEXTS = ("reasoning_content", "content")
"""Keys of a message whose values are texts, in the order of reading."""
_PART_CHARS = 256 * 1024
"""Characters of a long text that are encoded at once, so that there is no second copy of it."""


def texts_of(content: Content) -> list[str]:
    """The texts of a document: it itself, or those of all messages, a pair's prompt once; none of token ids."""
    match content:
        case str():
            return [content]
        case Dialogue():
            return _texts(content.messages)
        case PreferencePair():
            return _texts((*content.prompt.messages, *content.chosen, *content.rejected))
        case _:
            return []


def is_empty(content: Content) -> bool:
    """Whether there is nothing in it: no character, no tool call, no token; a pair: none in either answer."""
    match content:
        case Dialogue():
            return _says_nothing(content.messages)
        case PreferencePair():
            return _says_nothing(content.chosen) and _says_nothing(content.rejected)
        case _:
            return len(content) == 0


def clean_content(content: Content, clean: Clean, num_steps: int) -> tuple[Content, tuple[int, ...]]:
    """The content with every text of it cleaned, and the changes that each of ``num_steps`` steps made in all of them."""
    made = [0] * num_steps

    def cleaned(text: str) -> str:
        text, changes = clean(text)
        for step, count in enumerate(changes):
            made[step] += count
        return text

    def message(given: Message) -> Message:
        return given | {key: cleaned(given[key]) for key in _TEXTS if isinstance(given.get(key), str)}

    def messages(given: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(message(item) for item in given)

    result: Content
    match content:
        case str():
            result = cleaned(content)
        case Dialogue():
            result = replace(content, messages=messages(content.messages))
        case PreferencePair():
            prompt = replace(content.prompt, messages=messages(content.prompt.messages))
            result = PreferencePair(prompt=prompt, chosen=messages(content.chosen), rejected=messages(content.rejected))
        case _:
            result = content
    return result, tuple(made)


def content_digest(content: Content) -> bytes:
    """sha256 of a content: of a text in UTF-8, of token ids as int64, of a dialogue's or pair's one canonical JSON form."""
    sha256 = hashlib.sha256()
    match content:
        case str():
            for start in range(0, len(content), _PART_CHARS):
                sha256.update(content[start : start + _PART_CHARS].encode())
        case Dialogue():
            sha256.update(_canonical([content.messages, content.tools]))
        case PreferencePair():
            sha256.update(_canonical([content.prompt.messages, content.prompt.tools, content.chosen, content.rejected]))
        case _:
            sha256.update(content.astype("<i8").data)
    return sha256.digest()


def side_digest(content: Content, own: bytes) -> bytes:
    """What decides whether a document is validated on: the digest of its content, ``own``; of a preference pair that of its
    prompt, so that all answers to one prompt are on the same side."""
    return content_digest(content.prompt) if isinstance(content, PreferencePair) else own


def held_out(digest: bytes, fraction: float) -> bool:
    """Whether what has this digest is among the ``fraction`` that is validated on."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def with_content(document: Document, content: Content) -> Document:
    """The document with another content."""
    return document if content is document.content else replace(document, content=content)


def _texts(messages: Sequence[Message]) -> list[str]:
    return [message[key] for message in messages for key in _TEXTS if isinstance(message.get(key), str)]


def _says_nothing(messages: Sequence[Message]) -> bool:
    return not any(_texts(messages)) and not any(message.get("tool_calls") for message in messages)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
