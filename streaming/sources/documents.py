"""Documents that are already in memory as a work unit: what the kinds ``mds`` and ``custom`` cut themselves into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from outgrow.streaming.sources.document import UNIT_BYTES, Dialogue, Document, Dropped, Message, PreferencePair


@dataclass(frozen=True, kw_only=True)
class DocumentsUnit:
    """Some documents."""

    items: tuple[Document | Dropped, ...]
    num_bytes: int

    def documents(self) -> Iterator[Document | Dropped]:
        return iter(self.items)


def units_of(documents: Iterable[Document | Dropped]) -> Iterator[DocumentsUnit]:
    """The documents in order, in units of at least ``UNIT_BYTES`` of text or token ids."""
    items: list[Document | Dropped] = []
    num_bytes = 0
    for document in documents:
        items.append(document)
        num_bytes += size_of(document)
        if num_bytes >= UNIT_BYTES:
            yield DocumentsUnit(items=tuple(items), num_bytes=num_bytes)
            items, num_bytes = [], 0
    if items:
        yield DocumentsUnit(items=tuple(items), num_bytes=num_bytes)


def size_of(document: Document | Dropped) -> int:
    """Characters of a text or of all texts of messages, or bytes of token ids."""
    if isinstance(document, Dropped):
        return 0
    match document.content:
        case str() as text:
            return len(text)
        case Dialogue() as dialogue:
            return _chars(dialogue.messages)
        case PreferencePair() as pair:
            return _chars(pair.prompt.messages) + _chars(pair.chosen) + _chars(pair.rejected)
        case token_ids:
            return token_ids.nbytes


def _chars(messages: tuple[Message, ...]) -> int:
    return sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in messages)
