"""How alike two texts are, told from signatures of 512 bytes: MinHash of word 5-grams, and the bands that find pairs.

A signature is made where a document is read (rensa's R-MinHash); that it equals another's in a share s of its numbers estimates
that the two texts have s of their 5-grams in common (Jaccard similarity, standard error at most 0.045). Pairs that may be alike
are those that agree in all rows of one of the bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.streaming.document_table import SIGNATURE_SIZE

FORMAT = 1
"""Counts up when the same text would give another signature."""
GRAM_WORDS = 5

Signature: TypeAlias = npt.NDArray[np.uint32]

_SEED = 1
_PIECE_CHARS = 256 * 1024
"""A text is divided into words by pieces of about this many characters; a list of words takes ten times its text."""
_MISSED = 0.95
"""Weight of a missed pair when bands are chosen, against 1 less this of a pair compared in vain: a comparison is cheap."""

# Writing without spaces between words (Chinese, Japanese): each character is a word.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_BREAK = re.compile(r"\s")


def signature(content: str | npt.NDArray[np.integer[Any]]) -> Signature:
    """MinHash of the word 5-grams of a text, uint32 [128]; case, punctuation and spaces do not count.

    A text of fewer than five words is one gram; one of no word at all is like none but its equal. Of token ids the 5-grams of
    tokens. Where there is nothing at all (a dialogue of tool calls alone has no text) zeros, which are like nothing. Takes some
    30 bytes a word of the longest text meanwhile.
    """
    if len(content) == 0:
        return np.zeros(SIGNATURE_SIZE, np.uint32)
    words = _words(content) if isinstance(content, str) else _mixed(content.astype(np.uint64))
    grams = _grams(words, GRAM_WORDS)
    matrix = _rensa().digest_matrix_from_flat_token_hashes(grams, np.array([0, len(grams)], np.uint64), SIGNATURE_SIZE, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


@cache
def bands(similarity: float) -> tuple[int, int]:
    """How many bands of how many rows (bands x rows <= 128) find pairs from ``similarity`` on.

    A pair of similarity s shares a band with probability P(s) = 1 - (1 - s^rows)^bands. Chosen is what makes least of
    0.05 x (integral of P below ``similarity``) + 0.95 x (integral of 1 - P above it). At 0.8: 16 bands of 8 rows, which find
    95% of the pairs of similarity 0.8, 99.4% of 0.85 and 99.99% of 0.9.
    """
    steps = 1000
    s = (np.arange(steps) + 0.5) / steps
    below = s < similarity
    best, found = (0, 0), np.inf
    for rows in range(1, SIGNATURE_SIZE + 1):
        for count in range(1, SIGNATURE_SIZE // rows + 1):
            shared = 1 - (1 - s**rows) ** count
            cost = (1 - _MISSED) * shared[below].sum() + _MISSED * (1 - shared[~below]).sum()
            if cost < found:
                best, found = (count, rows), cost
    return best


def band_keys(part: Signature) -> npt.NDArray[np.uint64]:
    """One number for the rows of one band, uint64 [n] of uint32 [n, rows]: equal where all rows are equal."""
    keys: npt.NDArray[np.uint64] = _grams(part.astype(np.uint64).T, part.shape[1])[0]
    return keys


def agreement(a: Signature, b: Signature) -> npt.NDArray[np.int64]:
    """In how many of their numbers the two of each pair agree, int64 [n]; ``a`` and ``b`` are uint32 [n, 128]."""
    # Counted as bits: adding 128 booleans along the last axis takes five times as long.
    bits = np.packbits(a == b, axis=1).view(np.uint64)
    counts: npt.NDArray[np.int64] = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    return counts


def share_a_band(a: Signature, b: Signature, similarity: float) -> npt.NDArray[np.bool_]:
    """Whether the two of each pair agree in all rows of one of the bands for ``similarity``, bool [n]."""
    count, rows = bands(similarity)
    equal = (a == b)[:, : count * rows].reshape(len(a), count, rows)
    shared: npt.NDArray[np.bool_] = equal.all(axis=2).any(axis=1)
    return shared


def _rensa() -> Any:
    from rensa import RMinHash  # type: ignore[import-untyped]  # those who only read rows never need it

    return RMinHash


def _words(text: str) -> npt.NDArray[np.uint64]:
    """A hash of each word of a text in order, uint64 [words]; of a text without a word one hash of all of it."""
    hash_words = _rensa().hash_token_sets
    hashes = []
    start = 0
    while start < len(text):
        # Cut at a space, so no word is divided; a text without one for so long is cut anywhere.
        gap = _BREAK.search(text, start + _PIECE_CHARS, start + 2 * _PIECE_CHARS)
        stop = gap.start() if gap else start + 2 * _PIECE_CHARS
        words = _WORD.findall(text[start:stop].lower())
        hashes.append(np.array(hash_words([words])[0], np.uint64))
        start = stop
    found = np.concatenate([np.empty(0, np.uint64), *hashes])
    return found if len(found) else np.array(hash_words([[text]])[0], np.uint64)


def _grams(words: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
    """A hash of every run of ``size`` words, uint64 [words - size + 1, ...]; of all of them where they are fewer."""
    size = min(size, len(words))
    count = len(words) - size + 1
    grams = words[:count].copy()
    for shift in range(1, size):
        grams *= np.uint64(0x9E3779B97F4A7C15)
        grams += words[shift : shift + count]
    return _mixed(grams)


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Every bit depends on every bit of the number: the finaliser of splitmix64 (Steele, Lea, Flood 2014), one to one."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = numbers ^ (numbers >> np.uint64(31))
    return mixed
