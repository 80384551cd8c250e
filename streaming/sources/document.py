"""What a source yields: documents, what it had to leave out, and the work units that documents come in.

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

TokenIds: TypeAlias = npt.NDArray[np.int64]
Message: TypeAlias = dict[str, Any]
"""One turn in OpenAI's form, plain JSON: ``role`` and ``content`` (texts, always there), perhaps ``reasoning_content`` (the
thinking before the answer), ``tool_calls``, ``tool_call_id`` and ``name``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """Messages in order, at least one; ``tools`` are the functions that may be called, as JSON schemas in OpenAI's form."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two ways that one dialogue can end: both begin with the messages of ``prompt``."""

    prompt: Dialogue
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


Content: TypeAlias = str | TokenIds | Dialogue | PreferencePair


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: a text, a dialogue, a preference pair, or token ids (int64 [n], of the recipe's tokenizer).

    ``source`` tells where it came from (``file`` or ``file#line``); ``meta`` holds JSON values that are kept beside the tokens.
    """

    content: Content
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


DropReason: TypeAlias = Literal["empty", "undecodable", "malformed", "missing", "unrenderable"]
"""Why a source, or the way from it to tokens, leaves a document out: it has no text; its encoding is unknown; it is not what
its kind should be; a link leads nowhere; the chat template refuses it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A document that is left out, as the recipe allows. ``detail`` says in a sentence why; ``content`` is what it held, as
    text, where it is quarantined."""

    source: str
    reason: DropReason
    detail: str = ""
    content: str = ""


class BadRecordError(ValueError):
    """Raised by readers for a file or record that does not fit; ``on_error`` of the recipe decides what becomes of it.

    ``line`` is the line within the file, 0 where the whole file is meant or lines mean nothing; ``source`` names the document
    that it would have been, where that is not the file with its line; ``content`` is what it holds, for quarantine.
    """

    def __init__(
        self, message: str, *, reason: DropReason = "malformed", line: int = 0, source: str = "", content: str = ""
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.line = line
        self.source = source
        self.content = content


class Unit(Protocol):
    """A part of a source that one process reads and tokenises at a time; plain data, so that it can be sent there."""

    @property
    def num_bytes(self) -> int:
        """Size of its text, for progress."""

    def documents(self) -> Iterator[Document | Dropped]:
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
