"""Where a new sentence or line begins, from token ids alone: three tables over the vocabulary, looked up for all tokens at
once.

A sentence ends with a token whose text ends in ``.``, ``!``, ``?`` or ``…``, perhaps with closing quotes or brackets after
it, in the same token or in tokens of their own; the next begins where the next token begins with white space. A line begins
after a token that ends with a line break. Abbreviations are taken for ends of sentences: a row may be cut there as well.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.streaming.tokenizer import TextTokenizer

_CLOSERS = "\"'»”’“)]}*_"
_ENDS_SENTENCE = re.compile(rf"[.!?…。！？][{re.escape(_CLOSERS)}]*$")
_ENDS_LINE = re.compile(r"\n[ \t]*$")
_CLOSES = re.compile(rf"[{re.escape(_CLOSERS)}]+$")
_MOST_CLOSERS = 2
"""Tokens of closing quotes and brackets after the token that ends a sentence."""

_AT_ONCE = 2**20
"""Tokens that are looked at together, so that a document of any length takes some megabytes."""

_SENTENCE, _LINE, _CLOSER, _SPACED, _FRESH = 1, 2, 4, 8, 16
"""Ends a sentence; ends a line; closes quotes or brackets; begins with white space; may begin a line."""


class SentenceBorders:
    """Finds where sentences and lines begin in the tokens of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        special = {number for number, token in tokenizer.added_tokens.items() if token.special}
        self._table = np.zeros(tokenizer.vocab_size, np.uint8)
        for token_id, text in tokenizer.token_texts().items():
            if token_id not in special:
                self._table[token_id] = _signs(text)

    def find(self, tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
        """int32 [k]: numbers of the tokens with which a sentence or line begins, ascending, never 0."""
        overlap = 1 + _MOST_CLOSERS  # as far back as what begins with a token depends on the tokens before it
        found = [np.empty(0, np.int32)]
        for start in range(0, len(tokens), _AT_ONCE):
            first = max(0, start - overlap)
            begins = first + self._find(tokens[first : start + _AT_ONCE])
            found.append(begins[begins >= start].astype(np.int32))
        return np.concatenate(found)

    def _find(self, tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        signs = self._table[tokens]
        before, after = signs[:-1], signs[1:]
        ends = before & _SENTENCE
        for _ in range(_MOST_CLOSERS):
            ends[1:] |= ends[:-1] & (before[1:] >> 2)
        begins = (ends & (after >> 3)) | ((before >> 1) & (after >> 4) & 1)
        return np.flatnonzero(begins) + 1


def _signs(text: str) -> int:
    """What ``find`` asks of a token, as bits."""
    signs = _SENTENCE if _ENDS_SENTENCE.search(text) else 0
    signs |= _LINE if _ENDS_LINE.search(text) else 0
    signs |= _CLOSER if _CLOSES.match(text) else 0
    if text and text[0].isspace():
        signs |= _SPACED
    if text and text[0] not in "\r\n":
        signs |= _FRESH
    return signs
