"""Work units to token blocks: read, clean, choose the split, render and encode. Runs in the processes of a build."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.recipes.schema.data import Data
from outgrow.recipes.schema.streams import Stream
from outgrow.streaming.cleaning import Cleaner
from outgrow.streaming.contents import clean_content, content_digest, held_out, is_empty, side_digest, texts_of, with_content
from outgrow.streaming.render import Rendered, Renderer
from outgrow.streaming.sources.document import Document, Dropped, Unit
from outgrow.streaming.token_block import StoredDocument, TokenBlock, make_block
from outgrow.streaming.word_cache import CachingTokenizer

_BATCH_CHARS = 256 * 1024
"""Characters that are rendered and encoded at once."""


@dataclass(frozen=True, kw_only=True)
class TokeniseWork:
    """What a process of the build does, as plain data: called there, it gives the function from units to blocks.

    ``tokenizer`` holds the files of the tokenizer by name, for another node may not see the building folder; ``templates`` the
    chat template of each stream, None where it has none.
    """

    tokenizer: Mapping[str, bytes]
    templates: tuple[str | None, ...]
    streams: tuple[Stream, ...]
    validation_fraction: float
    languages: bool
    signatures: bool

    def __call__(self) -> Tokenise:
        return Tokenise(self)


def tokenise_work(
    folder: Path, templates: tuple[str | None, ...], data: Data, *, languages: bool, signatures: bool
) -> TokeniseWork:
    """The work of a build with the tokenizer in ``folder``."""
    return TokeniseWork(
        tokenizer={path.name: path.read_bytes() for path in sorted(folder.iterdir())},
        templates=templates,
        streams=data.streams,
        validation_fraction=data.validation_fraction,
        languages=languages,
        signatures=signatures,
    )


class Tokenise:
    """Turns units into token blocks."""

    def __init__(self, work: TokeniseWork) -> None:
        with tempfile.TemporaryDirectory(prefix="outgrow-tokenizer-") as name:
            for file, data in work.tokenizer.items():
                Path(name, file).write_bytes(data)
            tokenizer = CachingTokenizer(Path(name))
        self._work = work
        self._streams = [
            _StreamWork(stream, Cleaner(stream.clean), Renderer(tokenizer, stream, template))
            for stream, template in zip(work.streams, work.templates, strict=True)
        ]

    def __call__(self, work: tuple[int, Unit]) -> TokenBlock:
        """The block of a unit, given with the number of its stream."""
        number, unit = work
        stream = self._streams[number]
        changed = np.zeros((len(stream.stream.clean), 2), np.int64)
        dropped: list[Dropped] = []
        stored: list[StoredDocument] = []
        for batch in _batches(stream.cleaned(unit.documents(), changed, dropped)):
            for document, made in zip(batch, stream.renderer.encode(batch), strict=True):
                if isinstance(made, Dropped):
                    dropped.append(made)
                else:
                    stored.append(self._stored(document, made, stream.stream))
        return make_block(
            stored,
            stream=number,
            num_bytes=unit.num_bytes,
            dropped=dropped,
            cleaned=[(documents, changes) for documents, changes in changed.tolist()],
        )

    def _stored(self, document: Document, made: Rendered, stream: Stream) -> StoredDocument:
        digest = content_digest(document.content)
        texts = texts_of(document.content)
        joined = "\n".join(texts) if self._work.languages or self._work.signatures else ""
        is_text = not isinstance(document.content, np.ndarray)
        return StoredDocument(
            tokens=made.tokens,
            weights=made.weights,
            spans=made.spans,
            borders=made.borders,
            source=document.source,
            meta=json.dumps(document.meta, sort_keys=True, ensure_ascii=False),
            validation=stream.use == "validation"
            or held_out(side_digest(document.content, digest), self._work.validation_fraction),
            content=digest[:16],
            chars=sum(map(len, texts)),
            language=_language(joined) if self._work.languages else None,
            signature=_signature(joined if is_text else document.content) if self._work.signatures else None,
        )


@dataclass(frozen=True)
class _StreamWork:
    stream: Stream
    cleaner: Cleaner
    renderer: Renderer

    def cleaned(
        self, documents: Iterable[Document | Dropped], changed: np.ndarray[Any, np.dtype[np.int64]], dropped: list[Dropped]
    ) -> Iterator[Document]:
        """The documents that are left, cleaned; ``changed`` int64 [steps, 2] counts documents and changes, ``dropped`` takes
        what the source left out and what is empty now."""
        steps = len(self.stream.clean)
        for document in documents:
            if isinstance(document, Dropped):
                dropped.append(document)
                continue
            if steps:
                content, changes = clean_content(document.content, self.cleaner, steps)
                changed[:, 0] += np.array(changes) > 0
                changed[:, 1] += changes
                document = with_content(document, content)
            if is_empty(document.content):
                detail = "nothing is left after cleaning" if steps else "it holds no text"
                dropped.append(Dropped(source=document.source, reason="empty", detail=detail))
                continue
            yield document


def _language(text: str) -> str:
    from outgrow.streaming.languages import detect

    return detect([text])[0] if text else ""


def _signature(content: Any) -> Any:
    from outgrow.streaming.duplicates import signature

    return signature(content)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches of about ``_BATCH_CHARS``."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += sum(map(len, texts_of(document.content)))
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
