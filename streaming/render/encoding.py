"""Layouts to tokens: the runs of all dialogues of a batch go to the encoder together, and come back with weights and
borders."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.streaming.render.dialogues import Written
from outgrow.streaming.render.layout import Run, Token
from outgrow.streaming.stretches import Stretch
from outgrow.streaming.tokenizer import Encoded, TextTokenizer, Tokens

_KEPT_CHARS = 64
_KEPT = 100_000
"""So many encoded stretches of at most ``_KEPT_CHARS`` characters are kept."""


@dataclass(frozen=True)
class EncodedDialogue:
    """``tokens`` uint16 or uint32 [n], ``weights`` float32 [n], ``borders`` int32 [k]: tokens with which a turn begins, never
    0."""

    tokens: Tokens
    weights: npt.NDArray[np.float32]
    borders: npt.NDArray[np.int32]


class DialogueEncoder:
    """Encodes rendered dialogues, after ``tag`` where it is given."""

    def __init__(self, tokenizer: TextTokenizer, tag: int | None) -> None:
        self._tokenizer = tokenizer
        self._tag = tag
        self._kept: dict[Stretch, Encoded] = {}

    def encode(self, written: Sequence[Written]) -> list[EncodedDialogue]:
        """The tokens of each dialogue."""
        stretches = [self._stretch(unit, own.fields) for own in written for unit in own.layout.units if isinstance(unit, Run)]
        encoded = self._encode(stretches)
        made = []
        for own in written:
            builder = _Tokens(self._tokenizer.dtype)
            if self._tag is not None:
                builder.add_token(Token(self._tag, 0.0, begins=False))
            for unit in own.layout.units:
                if isinstance(unit, Token):
                    builder.add_token(unit)
                else:
                    builder.add_run(unit, next(encoded))
            made.append(builder.dialogue())
        return made

    def _encode(self, stretches: Sequence[Stretch]) -> Iterator[Encoded]:
        """The encoded stretches in order. Short ones, such as the line break between turns, come again: they are kept."""
        new = list(dict.fromkeys(stretch for stretch in stretches if stretch not in self._kept))
        made = dict(zip(new, self._tokenizer.encode_stretches(new), strict=True))
        yield from (made[stretch] if stretch in made else self._kept[stretch] for stretch in stretches)
        for stretch, encoded in made.items():
            if len(stretch.text) <= _KEPT_CHARS and len(self._kept) < _KEPT:
                self._kept[stretch] = encoded

    def _stretch(self, run: Run, fields: Sequence[str]) -> Stretch:
        """The text of a run; its marks are the beginnings of its sections but the first."""
        texts = ["".join([part if isinstance(part, str) else fields[part] for part in own.parts]) for own in run.sections]
        return Stretch("".join(texts), run.after_token or self._tag is not None, tuple(accumulate(map(len, texts[:-1]))))


class _Tokens:
    """A dialogue's tokens as they come, weights run by run."""

    def __init__(self, dtype: np.dtype[np.unsignedinteger[Any]]) -> None:
        self._dtype = dtype
        self._token_ids = array(dtype.char)
        self._counts: list[int] = []
        self._weights: list[float] = []
        self._borders: list[int] = []

    def add_token(self, token: Token) -> None:
        if token.begins:
            self._borders.append(len(self._token_ids))
        self._token_ids.append(token.token_id)
        self._counts.append(1)
        self._weights.append(token.weight)

    def add_run(self, run: Run, encoded: Encoded) -> None:
        at = len(self._token_ids)
        self._token_ids.extend(encoded.token_ids)
        for section, start, stop in zip(
            run.sections, [0, *encoded.marks], [*encoded.marks, len(encoded.token_ids)], strict=True
        ):
            if section.begins:
                self._borders.append(at + start)
            self._counts.append(stop - start)
            self._weights.append(section.weight)

    def dialogue(self) -> EncodedDialogue:
        borders = [at for at in dict.fromkeys(self._borders) if 0 < at < len(self._token_ids)]
        return EncodedDialogue(
            np.frombuffer(self._token_ids, self._dtype),
            np.repeat(np.array(self._weights, np.float32), self._counts),
            np.array(borders, np.int32),
        )
