"""Tokenizers: opened from a Hugging Face folder or trained on text, named by a fingerprint, and applied to documents.

Documents are encoded as plain text: one that spells ``<|endoftext|>`` gets the tokens of those characters, not the token that
ends a document. No special token is added but that one, after each document.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-untyped]

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError
from outgrow.storage import fingerprint

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token of tokenizers that are trained here; its id is 0."""

PIECE_CHARS = 256 * 1024
"""Longer texts are encoded in pieces, and no more is encoded at once: the encoder takes some hundred bytes a character."""

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


class TextTokenizer:
    """A tokenizer as datasets use it: no padding, no truncation, no special tokens found in text.

    ``fingerprint`` is the sha256 of tokenizer.json in canonical form; ``vocab_size`` one more than the greatest token id;
    ``dtype`` the smaller of uint16 and uint32 that holds every token id.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ``DataError`` where the folder holds no tokenizer.json, or does not say which token ends a text."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                "there is no tokenizer.json in the folder", where=str(folder), hint="save the tokenizer in its fast form first"
            )
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # noqa: B902  (the library raises nothing narrower)
            raise DataError(f"tokenizer.json cannot be read: {error}", where=str(path)) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.folder = folder
        self.fingerprint = fingerprint(json.loads(text))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint16 if self.vocab_size <= 65_536 else np.uint32)
        self.eos_token_id = self._end_of_text()

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, ``dtype`` [n], the last of them the end-of-text token.

        A text of more than ``PIECE_CHARS`` is encoded in pieces. Byte-level tokenizers give the same tokens as for the whole
        where the text has spaces or lines; others may differ at the cuts.
        """
        token_ids = [array(self.dtype.char) for _ in texts]
        for batch in _batches(texts):
            encoded = self._tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (number, _), encoding in zip(batch, encoded, strict=True):
                token_ids[number].extend(encoding.ids)
        for own in token_ids:
            own.append(self.eos_token_id)
        return [np.frombuffer(own, self.dtype) for own in token_ids]

    def decode(self, token_ids: npt.NDArray[np.integer[Any]]) -> str:
        """The text of token ids, special tokens shown."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    def _end_of_text(self) -> int:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.folder / name
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token") if path.is_file() else None
            if token is not None:
                content = token["content"] if isinstance(token, dict) else token
                token_id = self._tokenizer.token_to_id(content)
                if token_id is None:
                    raise DataError(f"the eos_token {content!r} is not in the vocabulary", where=str(path))
                return int(token_id)
        raise DataError(
            "the tokenizer does not say which token ends a text",
            where=str(self.folder),
            hint='add "eos_token" to its tokenizer_config.json',
        )


def pieces(text: str, limit: int) -> Iterator[str]:
    """The text in parts of at most ``limit`` characters, cut before a line, else a word, that begins in a part's last half."""
    start = 0
    while len(text) - start > limit:
        window = (start + limit // 2, start + limit)
        line, word = _last_break(text, "\n", *window), _last_break(text, " ", *window)
        cut = line + 1 if line >= 0 else word if word >= 0 else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """The pieces of all texts, each with the number of its text, in batches of about ``PIECE_CHARS``."""
    batch: list[tuple[int, str]] = []
    num_chars = 0
    for number, text in enumerate(texts):
        for piece in pieces(text, PIECE_CHARS):
            if batch and num_chars + len(piece) > PIECE_CHARS:
                yield batch
                batch, num_chars = [], 0
            batch.append((number, piece))
            num_chars += len(piece)
    if batch:
        yield batch


def _last_break(text: str, mark: str, start: int, stop: int) -> int:
    """Position of the last ``mark`` in ``text[start:stop]`` that stands between two characters other than spaces; -1 without.

    Byte-level tokenizers divide words there whatever stands further on, so a cut changes no token.
    """
    at = text.rfind(mark, start, stop)
    while at > start and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(mark, start, at)
    return at if at > start else -1


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
    """The tokenizer of ``source`` copied into ``folder``, only its own files of what may be a whole model folder."""
    TextTokenizer(source)
    folder.mkdir(parents=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
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
