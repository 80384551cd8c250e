"""Documents to tokens, loss weights and borders: texts as plain text, dialogues and preference pairs by their chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.recipes.schema.sources import FileSource
from outgrow.recipes.schema.streams import Stream
from outgrow.streaming.borders import SentenceBorders
from outgrow.streaming.render.chat_template import ChatTemplate
from outgrow.streaming.render.dialogues import Dialogues, Written
from outgrow.streaming.render.encoding import DialogueEncoder, EncodedDialogue
from outgrow.streaming.render.specials import Specials
from outgrow.streaming.render.unrenderable import UnrenderableError
from outgrow.streaming.sources.document import Dialogue, Document, Dropped, PreferencePair, TokenIds
from outgrow.streaming.tokenizer import TextTokenizer, Tokens

_QUARANTINE_CHARS = 64 * 1024
"""At most this much of a refused dialogue is kept."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A document as it is stored.

    tokens   uint16 or uint32 [n]   a text ends with the end-of-text token, a dialogue with what its template ends with
    weights  float32 [n] or None    loss weight of each token as a target; None: all 1
    spans    int32 [2, 2] or None   preference pairs alone: start and stop of chosen, then of rejected, each with its prompt
    borders  int32 [k]              tokens at which a new sentence or turn begins, ascending, never 0
    """

    tokens: Tokens
    weights: npt.NDArray[np.float32] | None = None
    spans: npt.NDArray[np.int32] | None = None
    borders: npt.NDArray[np.int32]


class Renderer:
    """Renders and encodes the documents of a stream, with its tag and its chat template."""

    def __init__(self, tokenizer: TextTokenizer, stream: Stream, template: str | None) -> None:
        """``template`` is None where the stream has no dialogues. Raises ``DataError`` where it is no Jinja template, or where
        the tokenizer lacks the stream's tag."""
        self._tokenizer = tokenizer
        self._stream = stream
        self._tag = _tag(tokenizer, stream)
        self._borders = SentenceBorders(tokenizer)
        self._encoder = DialogueEncoder(tokenizer, self._tag)
        self._dialogues: Dialogues | None = None
        if template is not None:
            compiled = ChatTemplate(template, tokenizer.named_tokens, stream.chat.date)
            self._dialogues = Dialogues(compiled, Specials(tokenizer), stream.chat)

    def encode(self, documents: Sequence[Document]) -> list[Rendered | Dropped]:
        """Each document's tokens, weights and borders; ``Dropped`` for a dialogue that the template refuses where the recipe
        goes on without it, else ``DataError``."""
        made: list[Rendered | Dropped | None] = [None] * len(documents)
        texts: list[tuple[int, str]] = []
        dialogues: list[tuple[int, list[Written]]] = []
        for number, document in enumerate(documents):
            match document.content:
                case str() as text:
                    texts.append((number, text))
                case Dialogue() | PreferencePair() as content:
                    try:
                        dialogues.append((number, self._write(content)))
                    except UnrenderableError as error:
                        made[number] = self._refuse(document, error)
                case token_ids:
                    made[number] = self._of_text(self._checked(token_ids, document.source))
        for (number, _), tokens in zip(texts, self._tokenizer.encode([text for _, text in texts], tag=self._tag), strict=True):
            made[number] = self._of_text(tokens)
        encoded = iter(self._encoder.encode([own for _, written in dialogues for own in written]))
        for number, written in dialogues:
            made[number] = self._joined([next(encoded) for _ in written])
        return [item for item in made if item is not None]

    # --- texts and token ids ---

    def _of_text(self, tokens: Tokens) -> Rendered:
        return Rendered(tokens=tokens, borders=self._borders.find(tokens))

    def _checked(self, token_ids: TokenIds, source: str) -> Tokens:
        """The token ids that a document came with, and the end-of-text token unless it ends with that."""
        eos = self._tokenizer.eos_token_id
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < self._tokenizer.vocab_size:
            raise DataError(
                f"token ids from {token_ids.min()} to {token_ids.max()} are not of this tokenizer "
                f"({self._tokenizer.vocab_size:,} tokens)",
                where=source,
                hint="set data.tokenizer to the folder of the tokenizer that made them",
            )
        tokens: Tokens = token_ids.astype(self._tokenizer.dtype)
        return tokens if len(tokens) and tokens[-1] == eos else np.append(tokens, self._tokenizer.dtype.type(eos))

    # --- dialogues ---

    def _write(self, content: Dialogue | PreferencePair) -> list[Written]:
        if self._dialogues is None:
            raise DataError(
                "it has dialogues, and there is no chat template",
                where=f"data.streams: {self._stream.name}",
                hint="set chat.template of the stream: {kind: named, name: chatml}, or a file of yours",
            )
        if isinstance(content, Dialogue):
            return [self._dialogues.write(content)]
        return [self._dialogues.write(content.prompt, answer) for answer in (content.chosen, content.rejected)]

    def _joined(self, halves: list[EncodedDialogue]) -> Rendered:
        """The document of a dialogue, or of the two halves of a pair, of which none learns its first token."""
        if len(halves) == 1:
            (whole,) = halves
            borders = whole.borders if len(whole.borders) else self._borders.find(whole.tokens)
            return Rendered(tokens=whole.tokens, weights=whole.weights, borders=borders)
        stops = np.cumsum([len(half.tokens) for half in halves])
        spans = np.stack([stops - [len(half.tokens) for half in halves], stops], axis=1)
        weights = np.concatenate([half.weights for half in halves])
        weights[spans[:, 0]] = 0
        return Rendered(
            tokens=np.concatenate([half.tokens for half in halves]),
            weights=weights,
            spans=spans.astype(np.int32),
            borders=stops[:1].astype(np.int32),
        )

    def _refuse(self, document: Document, error: UnrenderableError) -> Dropped:
        on_error = self._stream.source.on_error if isinstance(self._stream.source, FileSource) else "stop"
        if on_error == "stop":
            raise DataError(
                str(error), where=document.source, hint="correct it or the chat template, or set on_error: skip or quarantine"
            ) from None
        content = _shown(document.content) if on_error == "quarantine" else ""
        return Dropped(source=document.source, reason="unrenderable", detail=str(error), content=content)


def _tag(tokenizer: TextTokenizer, stream: Stream) -> int | None:
    if not stream.tag:
        return None
    token_id = tokenizer.token_id(stream.tag)
    if token_id is None:
        raise DataError(f"the tokenizer has no token {stream.tag}", where=str(tokenizer.folder))
    return token_id


def _shown(content: Any) -> str:
    return json.dumps(asdict(content), ensure_ascii=False)[:_QUARANTINE_CHARS]
