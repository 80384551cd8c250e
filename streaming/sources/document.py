"""What a source yields: documents, the places where it had to leave one out, and the work units that documents come in.

A source lists its input files first (their digests are the identity of the dataset) and then cuts itself into work units: small
values that cross to another process and read their own part of the input there. Units depend on the input alone, so the
documents and their order are the same whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

UNIT_BYTES = 1024 * 1024
"""Input bytes of a work unit; a document is never divided between units, so a longer one makes a longer unit."""

MAX_DOCUMENT_BYTES = 256 * 1024 * 1024
"""Longest text of one document; it is held in memory whole while it is tokenised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: either ``text`` or ``token_ids`` (int64 [n], of the recipe's tokenizer).

    ``source`` tells where it came from (``file`` or ``file#line``); ``meta`` holds JSON values that are kept beside the tokens.
    """

    text: str | None = None
    token_ids: npt.NDArray[np.int64] | None = None
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError(f"document {self.source}: give either text or token_ids")


SkipReason: TypeAlias = Literal["empty", "undecodable", "malformed", "missing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A document that is left out: it has no text, or cannot be read and the recipe says ``on_error: skip``."""

    source: str
    reason: SkipReason


class Unit(Protocol):
    """A part of a source that one process reads and tokenises at a time; plain data, so that it can be sent there."""

    @property
    def num_bytes(self) -> int:
        """Size of its text, for progress."""

    def documents(self) -> Iterator[Document | Skipped]:
        """Its documents in order. Raises ``DataError`` where the recipe says ``on_error: stop``."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a source: ``name`` relative to the source's root, ``digest`` sha256 of its bytes.

    ``num_bytes`` is its size as stored, ``text_bytes`` decompressed.
    """

    name: str
    digest: str
    num_bytes: int
    text_bytes: int


class Source(Protocol):
    """An opened source of one stream."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs in the order in which they are read; never empty."""

    def units(self) -> Iterator[Unit]:
        """Its work units in order."""

    def check_unchanged(self) -> None:
        """Raises ``DataError`` naming an input that is no longer what ``inputs`` says."""
