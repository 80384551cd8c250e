"""Documents that are already in memory as a work unit: what the kinds ``mds`` and ``custom`` cut themselves into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from outgrow.streaming.sources.document import UNIT_BYTES, Document, Skipped


@dataclass(frozen=True, kw_only=True)
class DocumentsUnit:
    """Some documents."""

    items: tuple[Document | Skipped, ...]
    num_bytes: int

    def documents(self) -> Iterator[Document | Skipped]:
        return iter(self.items)


def units_of(documents: Iterable[Document | Skipped]) -> Iterator[DocumentsUnit]:
    """The documents in order, in units of at least ``UNIT_BYTES`` of text or token ids."""
    items: list[Document | Skipped] = []
    num_bytes = 0
    for document in documents:
        items.append(document)
        num_bytes += size_of(document)
        if num_bytes >= UNIT_BYTES:
            yield DocumentsUnit(items=tuple(items), num_bytes=num_bytes)
            items, num_bytes = [], 0
    if items:
        yield DocumentsUnit(items=tuple(items), num_bytes=num_bytes)


def size_of(document: Document | Skipped) -> int:
    """Characters of the text, or bytes of the token ids."""
    if isinstance(document, Skipped):
        return 0
    return (
        len(document.text) if document.text is not None else document.token_ids.nbytes if document.token_ids is not None else 0
    )
