"""Tokenizers: opened from a Hugging Face folder or trained on text, named by a fingerprint, and applied to documents.

Text is encoded as plain text: one that spells ``<|endoftext|>`` gets the tokens of those characters, not the token that ends a
document. No special token is added but that one, after each document, and a tag before it where there is one.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-untyped]

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError
from outgrow.storage import fingerprint
from outgrow.streaming import tokenizer_form
from outgrow.streaming.stretches import PIECE_CHARS, Piece, Stretch, batches, cut_piece, pieces
from outgrow.streaming.tokenizer_template import TEMPLATE, has_template_files, own_template

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token of tokenizers that are trained here; its id is 0."""

Tokens: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


class Encoded(NamedTuple):
    """The token ids of a stretch, and for each of its marks the number of the first token that begins there or later."""

    token_ids: array[int]
    marks: list[int]


class TextTokenizer:
    """A tokenizer as datasets use it: no padding, no truncation, no special tokens found in text.

    ``fingerprint`` is the sha256 of tokenizer.json in canonical form; ``vocab_size`` one more than the greatest token id;
    ``dtype`` the smaller of uint16 and uint32 that holds every token id; ``named_tokens`` what its folder calls ``bos_token``
    and so on. The folder may go once it is opened.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ``DataError`` where the folder holds no tokenizer.json, or does not say which token ends a text."""
        self.folder = folder
        form = tokenizer_form.read_form(folder)
        self.named_tokens = tokenizer_form.named_tokens(folder)
        self._tokenizer = tokenizer_form.load(form, self.named_tokens, folder)
        self.fingerprint = fingerprint(form)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint16 if self.vocab_size <= 65_536 else np.uint32)
        self.eos_token_id = self._end_of_text()
        special = {token.content: number for number, token in self.added_tokens.items() if token.special}
        self._reachable = tokenizer_form.reachable_specials(form, special)
        self._form = tokenizer_form.needed_later(form)

    def encode(self, texts: Sequence[str], *, tag: int | None = None) -> list[Tokens]:
        """Token ids of each text, ``dtype`` [n], the first of them ``tag`` where it is given, the last the end-of-text token.

        A text of more than ``PIECE_CHARS`` is encoded in pieces, with the same tokens as for the whole where it has spaces, or
        the tokenizer is byte-level and it has lines.
        """
        token_ids = [array(self.dtype.char, () if tag is None else (tag,)) for _ in texts]
        for piece, encoding in self._encodings([Stretch(text, tag is not None) for text in texts]):
            token_ids[piece.number].extend(encoding.ids)
        for own in token_ids:
            own.append(self.eos_token_id)
        return [np.frombuffer(own, self.dtype) for own in token_ids]

    def encode_stretches(self, stretches: Sequence[Stretch]) -> list[Encoded]:
        """Token ids of each stretch, and where the tokens of its marks begin; nothing added. Long ones as in ``encode``."""
        encoded = [Encoded(array(self.dtype.char), []) for _ in stretches]
        for piece, encoding in self._encodings(stretches):
            own = encoded[piece.number]
            own.marks.extend(len(own.token_ids) + _token_from(encoding, mark) for mark in piece.marks)
            own.token_ids.extend(encoding.ids)
        for stretch, own in zip(stretches, encoded, strict=True):
            own.marks.extend([len(own.token_ids)] * (len(stretch.marks) - len(own.marks)))  # those at its very end
        return encoded

    def decode(self, token_ids: npt.NDArray[np.integer[Any]]) -> str:
        """The text of token ids, special tokens shown."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    def token_id(self, text: str) -> int | None:
        """Id of the token that is spelled so, None where there is none."""
        return self._tokenizer.token_to_id(text)  # type: ignore[no-any-return]

    @property
    def added_tokens(self) -> dict[int, Any]:
        """The added tokens by id, special ones among them: ``tokenizers.AddedToken``."""
        return dict(self._tokenizer.get_added_tokens_decoder())

    def token_texts(self) -> dict[int, str]:
        """The text that each token stands for, by id; bytes that are no whole characters are replaced."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return tokenizer_form.token_texts(self._form, vocabulary, self.added_tokens)

    def finds(self, text: str, token_id: int) -> bool:
        """Whether transformers would find the special token ``token_id`` in a text."""
        self._tokenizer.encode_special_tokens = False
        try:
            return token_id in self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    @cached_property
    def _after_token(self) -> Tokenizer:
        return self._load(tokenizer_form.after_token(self._form))

    @cached_property
    def _going_on(self) -> Tokenizer:
        return self._load(tokenizer_form.going_on(self._form))

    def _load(self, form: tokenizer_form.JsonDict) -> Tokenizer:
        """The tokenizer of a variant of the form; the one that is loaded where they are the same."""
        return self._tokenizer if form is self._form else tokenizer_form.load(form, self.named_tokens, self.folder)

    def _encodings(self, stretches: Sequence[Stretch]) -> Iterator[tuple[Piece, Any]]:
        """The pieces of all stretches in order, each with its encoding."""
        for batch in batches(stretches):
            yield from self._encoded(batch)

    def _encoded(self, batch: Sequence[Piece]) -> Iterator[tuple[Piece, Any]]:
        made: list[Any] = [None] * len(batch)
        ways: dict[tuple[int, bool], list[int]] = {}
        for at, piece in enumerate(batch):
            ways.setdefault((piece.place, bool(piece.marks)), []).append(at)
        for (place, marked), chosen in ways.items():
            tokenizer = (self._tokenizer, self._after_token, self._going_on)[place]
            encode = tokenizer.encode_batch if marked else tokenizer.encode_batch_fast  # the fast way knows no offsets
            for at, encoding in zip(chosen, encode([batch[at].text for at in chosen], add_special_tokens=False), strict=True):
                made[at] = encoding
        if not self._reachable:
            yield from zip(batch, made, strict=True)
            return
        for piece, encoding in zip(batch, made, strict=True):
            if self._reachable.isdisjoint(encoding.ids):
                yield piece, encoding
            else:
                yield from self._encoded(self._divided(piece))

    def _divided(self, piece: Piece) -> list[Piece]:
        """A piece cut in the middle of all that the model takes for special tokens, so that they are spelled out."""
        (encoding,) = (self._tokenizer, self._after_token, self._going_on)[piece.place].encode_batch(
            [piece.text], add_special_tokens=False
        )
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._reachable]
        cuts = sorted({(start + stop + 1) // 2 for start, stop in spans} - {0, len(piece.text)})
        if not cuts:
            raise DataError(
                f"the text {piece.text[:40]!r} has no other token than a special one", where=str(self.folder / "tokenizer.json")
            )
        return cut_piece(piece, cuts)

    def _end_of_text(self) -> int:
        token = self.named_tokens.get("eos_token")
        if not token:
            raise DataError(
                "the tokenizer does not say which token ends a text",
                where=str(self.folder),
                hint='add "eos_token" to its tokenizer_config.json',
            )
        token_id = self.token_id(token)
        if token_id is None:
            raise DataError(
                f"the eos_token {token!r} is not in the vocabulary", where=str(self.folder / "tokenizer_config.json")
            )
        return token_id


def _token_from(encoding: Any, position: int) -> int:
    """Number of the first token that begins at the character ``position`` or later."""
    if position == 0:
        return 0
    at = encoding.char_to_token(position)
    if at is None:  # no token holds it: a normalizer took it away
        return next((number for number, (start, _) in enumerate(encoding.offsets) if start >= position), len(encoding))
    while at < len(encoding) and encoding.token_to_chars(at)[0] < position:
        at += 1
    return int(at)


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> TextTokenizer:
    """A byte-level BPE tokenizer trained on ``texts`` and saved in ``folder`` as transformers saves a fast tokenizer.

    The same texts give the same tokenizer whatever the number of threads. Raises ``DataError`` where the texts are too few to
    fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text, PIECE_CHARS)), trainer)
    made = tokenizer.get_vocab_size()
    if made != vocab_size:
        raise DataError(
            f"the sampled text gives a vocabulary of {made:,} tokens, not {vocab_size:,}",
            where="data.tokenizer.vocab_size",
            hint=f"set it to {made} or less, or give more text",
        )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", {"eos_token": END_OF_TEXT})):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return TextTokenizer(folder)


def copy_tokenizer(source: Path, folder: Path) -> TextTokenizer:
    """The tokenizer of ``source`` copied into ``folder``, only its own files of what may be a whole model folder.

    Several chat templates become one that chooses between them.
    """
    TextTokenizer(source)
    folder.mkdir(parents=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if has_template_files(source):
        (folder / TEMPLATE).write_text(own_template(source) or "", encoding="utf-8")
    return TextTokenizer(folder)


def check_tokenizer(card: DatasetCard, folder: Path) -> None:
    """Raises ``DataError`` with both fingerprints where the tokenizer in ``folder`` is not the one that built the dataset."""
    given = TextTokenizer(folder)
    if (given.fingerprint, given.eos_token_id) != (card.tokenizer_fingerprint, card.eos_token_id):
        raise DataError(
            f"the tokenizer {given.fingerprint[:16]} (end of text {given.eos_token_id}) does not match the dataset, "
            f"built with {card.tokenizer_fingerprint[:16]} (end of text {card.eos_token_id})",
            where=str(folder),
            hint="use the tokenizer that lies in the dataset's folder, or build the dataset again with this one",
        )
