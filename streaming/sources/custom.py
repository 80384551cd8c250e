"""Source ``custom``: documents that a function of the user's yields."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from outgrow.errors import DataError, OutgrowError
from outgrow.recipes.schema.sources import CustomSource
from outgrow.streaming.sources.document import BadRecordError, Content, Dialogue, Document, Dropped, Input, PreferencePair
from outgrow.streaming.sources.documents import DocumentsUnit, size_of, units_of
from outgrow.streaming.sources.messages import described, from_openai, tools_of
from outgrow.streaming.sources.reading import unfit


class CustomDocuments:
    """The opened source. Its one input is all that the function yields.

    The function is called again for each pass: whole for the digest and for the build, and as far as they need it for the
    tokenizer's sample and the forecast of room.
    """

    def __init__(self, source: CustomSource) -> None:
        self._source = source
        self._first = self._measure()
        self._last = self._first

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (self._first,)

    def check_unchanged(self) -> None:
        """Raises ``DataError`` where the function yielded other documents than the first time."""
        if self._last != self._first:
            raise DataError(
                f"{self._source.factory} yielded other documents than when it was called before",
                hint="make it depend on its options alone: no clock, no unseeded draw",
            )

    def units(self) -> Iterator[DocumentsUnit]:
        return units_of(self._documents())

    def _measure(self) -> Input:
        for _ in self._documents():
            pass
        if not self._last.num_bytes:
            raise DataError(f"{self._source.factory} yielded no document", hint="check its options")
        return self._last

    def _documents(self) -> Iterator[Document | Dropped]:
        """The documents; after the last one ``_last`` tells what they were."""
        digest = hashlib.sha256()
        num_bytes = 0
        for number, item in enumerate(_call(self._source)):
            where = f"{self._source.factory}, document {number}"
            document = _checked(item, where)
            for part in _parts(document, where):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
            num_bytes += size_of(document)
            yield document
        self._last = Input(name=self._source.factory, digest=digest.hexdigest(), num_bytes=num_bytes, text_bytes=num_bytes)


def open_custom(source: CustomSource) -> CustomDocuments:
    """The source. Raises ``DataError`` where the function cannot be imported or yields no documents, or something else."""
    return CustomDocuments(source)


def _call(source: CustomSource) -> Iterator[Any]:
    """What the function yields. Raises ``DataError`` for anything that its module or the function itself raises."""
    module, _, name = source.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{source.factory}: it cannot be imported: {reason}", hint="install or correct its package") from error
    try:
        yield from factory(**source.options)
    except OutgrowError:
        raise
    except Exception as error:  # and so may the function
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{source.factory}: {reason}", hint="correct it, or the options that it is given") from error


# --- what it may yield ------------------------------------------------------------------------------------------------


def _checked(item: Any, where: str) -> Document | Dropped:
    """The document in the form that the rest relies on. Raises ``DataError`` saying what is wrong with it."""
    if not isinstance(item, Document):
        raise DataError(f"it is {described(item)}; it must be outgrow.streaming.sources.Document", where=where)
    if not isinstance(item.source, str) or not isinstance(item.meta, dict):
        raise DataError("its source must be a text, and its meta a dict", where=where)
    try:
        document = replace(item, content=_content(item.content))
        bad = unfit(document)
    except BadRecordError as error:
        bad = error
    if bad is None:
        return document
    if bad.reason == "empty":
        return Dropped(source=item.source, reason="empty", detail=str(bad))
    raise DataError(str(bad), where=where, hint="correct the function")


def _content(content: Any) -> Content:
    match content:
        case str():
            return content
        case np.ndarray() if content.ndim == 1 and np.issubdtype(content.dtype, np.integer):
            return content.astype(np.int64)
        case Dialogue(messages=messages, tools=tools):
            return Dialogue(messages=from_openai(messages, "messages"), tools=tools_of(tools, "tools"))
        case PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected):
            return PreferencePair(
                prompt=Dialogue(messages=from_openai(prompt.messages, "prompt"), tools=tools_of(prompt.tools, "tools")),
                chosen=from_openai(chosen, "chosen"),
                rejected=from_openai(rejected, "rejected"),
            )
    raise BadRecordError(
        f"its content is {described(content)}; allowed: a text, token ids as a row of integers, Dialogue, PreferencePair"
    )


def _parts(document: Document | Dropped, where: str) -> tuple[bytes, ...]:
    """What a document is known by. Raises ``DataError`` where it holds what cannot be kept as JSON, or is no text."""
    if isinstance(document, Dropped):
        return (document.source.encode(errors="replace"),)
    content = document.content
    try:
        head = _json([type(content).__name__, document.source, document.meta])
        match content:
            case str():
                return head, content.encode()
            case np.ndarray():
                return head, content.astype("<i8").tobytes()
            case Dialogue() | PreferencePair():
                return head, _json(asdict(content))
    except UnicodeEncodeError:
        raise DataError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no text", where=where) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"its meta or messages are not JSON: {error}", where=where, hint="correct the function") from None


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
