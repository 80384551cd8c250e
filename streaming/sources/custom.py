"""Source ``custom``: documents that a function of the user's yields."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator

from outgrow.errors import DataError, OutgrowError
from outgrow.recipes.schema.data import CustomSource
from outgrow.streaming.sources.document import Document, Input
from outgrow.streaming.sources.documents import DocumentsUnit, size_of, units_of


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

    def _documents(self) -> Iterator[Document]:
        """The documents; after the last one ``_last`` tells what they were."""
        digest = hashlib.sha256()
        num_bytes = 0
        for document in _call(self._source):
            content = document.text.encode() if document.text is not None else document.token_ids
            head = json.dumps([document.text is None, document.source, document.meta], sort_keys=True).encode()
            for part in (head, content):
                digest.update(len(part).to_bytes(8, "little"))  # type: ignore[arg-type]
                digest.update(part)  # type: ignore[arg-type]
            num_bytes += size_of(document)
            yield document
        self._last = Input(name=self._source.factory, digest=digest.hexdigest(), num_bytes=num_bytes, text_bytes=num_bytes)


def _call(source: CustomSource) -> Iterator[Document]:
    """What the function yields. Raises ``DataError`` for anything that its module or the function itself raises."""
    module, _, name = source.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{source.factory}: it cannot be imported: {reason}", hint="install or correct its package") from error
    try:
        for document in factory(**source.options):
            if not isinstance(document, Document):
                raise DataError(
                    f"{source.factory} yielded {type(document).__name__}; it must yield outgrow.streaming.sources.Document"
                )
            yield document
    except OutgrowError:
        raise
    except Exception as error:  # and so may the function
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{source.factory}: {reason}", hint="correct it, or the options that it is given") from error


def open_custom(source: CustomSource) -> CustomDocuments:
    """The source. Raises ``DataError`` where the function cannot be imported or yields no documents."""
    return CustomDocuments(source)
