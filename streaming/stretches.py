"""Texts as they go to the encoder: stretches between special tokens, cut into pieces, gathered in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

PIECE_CHARS = 256 * 1024
"""Longer texts are encoded in pieces, and no more is encoded at once: the encoder takes some hundred bytes a character."""


class Stretch(NamedTuple):
    """A text to encode: the beginning of a document, or what follows a special token (``after_token``).

    ``marks`` are character positions in it, ascending, whose tokens are asked for.
    """

    text: str
    after_token: bool = False
    marks: tuple[int, ...] = ()


class Piece(NamedTuple):
    """A part of stretch ``number``; ``place`` 0 at the beginning of a document, 1 after a token, 2 within a text; ``marks`` are
    those of the stretch that lie in it, from its own beginning."""

    number: int
    text: str
    place: int
    marks: tuple[int, ...]


def pieces(text: str, limit: int) -> Iterator[str]:
    """The text in parts of at most ``limit`` characters, cut before a word, else a line, that begins in a part's last half."""
    start = 0
    while len(text) - start > limit:
        window = (start + limit // 2, start + limit)
        line, word = _last_break(text, "\n", *window), _last_break(text, " ", *window)
        cut = word if word >= 0 else line + 1 if line >= 0 else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def batches(stretches: Sequence[Stretch]) -> Iterator[list[Piece]]:
    """The pieces of all stretches in batches of about ``PIECE_CHARS``."""
    batch: list[Piece] = []
    num_chars = 0
    for number, stretch in enumerate(stretches):
        for piece in _pieces_of(number, stretch):
            if batch and num_chars + len(piece.text) > PIECE_CHARS:
                yield batch
                batch, num_chars = [], 0
            batch.append(piece)
            num_chars += len(piece.text)
    if batch:
        yield batch


def _pieces_of(number: int, stretch: Stretch) -> Sequence[Piece]:
    text, after_token, marks = stretch
    if len(text) <= PIECE_CHARS and (not marks or marks[-1] < len(text)):  # what most are
        return (Piece(number, text, int(after_token), marks),)
    cuts = accumulate(map(len, pieces(text, PIECE_CHARS)))
    return cut_piece(Piece(number, text, int(after_token), marks), [cut for cut in cuts if cut < len(text)])


def cut_piece(piece: Piece, cuts: Sequence[int]) -> list[Piece]:
    """A piece in parts that end at ``cuts``, ascending; a mark at its very end is in none."""
    made = []
    for start, stop in pairwise([0, *cuts, len(piece.text)]):
        marks = tuple(mark - start for mark in piece.marks if start <= mark < stop)
        made.append(Piece(piece.number, piece.text[start:stop], 2 if start else piece.place, marks))
    return made


def _last_break(text: str, mark: str, start: int, stop: int) -> int:
    """Position of the last ``mark`` in ``text[start:stop]`` that stands between two characters other than spaces; -1 without.

    Byte-level tokenizers divide words there whatever stands further on, and those of the SentencePiece kind at spaces, so a cut
    changes no token.
    """
    at = text.rfind(mark, start, stop)
    while at > start and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(mark, start, at)
    return at if at > start else -1
