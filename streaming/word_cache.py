"""A tokenizer that remembers words: text repeats them, and the encoder spends its time on finding where they end.

Byte-level tokenizers divide a text by a regular expression and encode each part by itself. ``_WORDS`` has, for the expressions
that are in use, one that finds some of the same divisions, and none that is not one, in ASCII, Latin and Cyrillic; what it is
not sure of stays in one part with what follows. Each part is encoded once and looked up from then on, so the tokens are those
of ``TextTokenizer`` at several times its rate. Tokenizers of other kinds are used as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.streaming.stretches import PIECE_CHARS, pieces
from outgrow.streaming.tokenizer import TextTokenizer, Tokens
from outgrow.streaming.tokenizer_form import JsonDict, read_form

_WORD_CHARS = 40
"""Longer parts are seldom met again and are not remembered."""
_MOST_WORDS = 2**18
"""Words that are remembered, some 40 MB; then all are forgotten."""

_LETTERS = "A-Za-zА-Яа-яЁё"
_MARKS = r"!-/:-@\[-`{-~"
# Any run ends before a space that is followed by something else: no expression has a space within or at the end of a part but
# among spaces, of which the last belongs to what follows.
_REST = r"[\s\S]+?(?= [!-~À-ԯ])|[\s\S]+"
# A run of letters ends before any other character of ASCII. What else is a letter, tables of Unicode do not agree on; and an
# accent may follow, which a normalizer joins to the letter.
_ASCII_NEXT = r"(?=[\x00-\x7f]|\Z)"
_RUN = rf"[{_LETTERS}]++{_ASCII_NEXT}"

_GPT2 = re.compile(
    rf"'(?:[stmd]|re|ve|ll){_ASCII_NEXT}"
    rf"| ?{_RUN}"
    rf"|(?!'(?:[stmd]|re|ve|ll)) ?[{_MARKS}]++(?=[ \t\r\n0-9{_LETTERS}]|\Z)"
    rf"| ?[0-9]++{_ASCII_NEXT}"
    r"|\n(?=[!-~])"
    rf"|{_REST}"
)
_LLAMA3 = re.compile(
    rf"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]){_ASCII_NEXT}"
    rf"|[\t {_MARKS}]?{_RUN}"
    rf"|(?: [{_MARKS}]|[{_MARKS}]{{2}})[{_MARKS}]*+(?:[\r\n]++|(?=[ \t0-9{_LETTERS}]|\Z))"
    rf"|[{_MARKS}](?:[\r\n]++|(?=[ \t0-9]|\Z))"  # alone before a letter it belongs to that
    rf"|[0-9]++{_ASCII_NEXT}"
    r"|\n++(?=[!-~])"
    rf"|{_REST}"
)
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {_LLAMA3_SPLIT % digits: _LLAMA3 for digits in ("{1,3}", "")}
"""By the expression of the tokenizer: Llama 3's, and Qwen's, which differs in digits alone."""


class CachingTokenizer(TextTokenizer):
    """A ``TextTokenizer`` whose ``encode`` remembers words; it gives the same tokens."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._word_pattern = words_of(read_form(folder))
        # Added tokens that are not special are found within text, also where a word would end.
        self._found_in_text = tuple(token.content for token in self.added_tokens.values() if not token.special)
        self._word_tokens: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str], *, tag: int | None = None) -> list[Tokens]:
        if self._word_pattern is None:
            return super().encode(texts, tag=tag)
        plain = [number for number, text in enumerate(texts) if any(token in text for token in self._found_in_text)]
        made = dict(zip(plain, super().encode([texts[number] for number in plain], tag=tag), strict=True))
        return [made[number] if number in made else self._by_words(text, tag) for number, text in enumerate(texts)]

    def _by_words(self, text: str, tag: int | None) -> Tokens:
        """The tokens of a text, put together a piece of it at a time: one copy of them is in memory."""
        assert self._word_pattern is not None
        known = self._word_tokens
        token_ids = bytearray(b"" if tag is None else self.dtype.type(tag).tobytes())
        for piece in pieces(text, PIECE_CHARS):
            words = self._word_pattern.findall(piece)
            if len(known) > _MOST_WORDS:
                known.clear()
            new = list(set(words).difference(known))
            for word, tokens in zip(new, super().encode(new), strict=True):
                known[word] = tokens[:-1].tobytes()  # less its end-of-text token
            token_ids += b"".join(map(known.__getitem__, words))
            for word in new:
                if len(word) > _WORD_CHARS:
                    del known[word]
        token_ids += self.dtype.type(self.eos_token_id).tobytes()
        return np.frombuffer(token_ids, self.dtype)


def words_of(form: JsonDict) -> re.Pattern[str] | None:
    """What finds the words of a tokenizer (``form``: its tokenizer.json); None where words cannot be encoded one by one, or it
    is not known."""
    model: dict[str, Any] = form.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout") or form.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    match form.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, **more} if more.get("use_regex", True):
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return _WORDS.get(split)
    return None
