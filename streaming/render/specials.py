"""Where special tokens stand in what a template wrote, as the tokenizers library would find them there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from outgrow.streaming.render.unrenderable import UnrenderableError
from outgrow.streaming.tokenizer import TextTokenizer


class SpecialToken(NamedTuple):
    """A special token in a text: ``start`` to ``stop`` with the white space that it swallows; it is spelled from ``at`` on."""

    start: int
    stop: int
    at: int
    token_id: int


class Specials:
    """The special tokens of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        added = tokenizer.added_tokens
        self._tokens: dict[str, tuple[int, Any]] = {token.content: (number, token) for number, token in added.items()}
        special = [token.content for token in added.values() if token.special]
        # Tokens that are found before a normalizer has touched the text compete for it: the leftmost wins, then the longest.
        raw = [token.content for token in added.values() if token.special or not token.normalized]
        self._competing = _any_of(raw)
        self._special = _any_of(special)
        self._unsteady = {
            token.content
            for number, token in added.items()
            if token.special and token.normalized and not _found_anywhere(tokenizer, token.content, number)
        }

    def spelled_in(self, text: str) -> str | None:
        """The first special token that a text spells, None where it spells none."""
        found = self._special.search(text)
        return found[0] if found else None

    def find(self, text: str, start: int, stop: int) -> Iterator[SpecialToken]:
        """The special tokens in ``text[start:stop]``, in order. Raises ``UnrenderableError`` for one that the tokenizer finds
        in some places alone."""
        free = start
        for found in self._competing.finditer(text, start, stop):
            token_id, token = self._tokens[found[0]]
            if not token.special:
                continue
            if found[0] in self._unsteady:
                raise UnrenderableError(
                    f"the chat template writes {found[0]!r}, which this tokenizer finds in some places alone; "
                    f'set "normalized": false for it in tokenizer.json'
                )
            if token.single_word and _touches_word(text, *found.span()):
                continue
            begin, end = found.span()
            if token.lstrip:
                begin = max(free, start + len(text[start:begin].rstrip()))
            if token.rstrip:
                end = stop - len(text[end:stop].lstrip())
            yield SpecialToken(begin, end, found.start(), token_id)
            free = end


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """What finds the leftmost of the texts, of several the longest; nothing where there is none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _found_anywhere(tokenizer: TextTokenizer, content: str, token_id: int) -> bool:
    """Whether a token that is sought in normalized text is found at the beginning of a text and within one."""
    return all(tokenizer.finds(text, token_id) for text in (content, f"a{content}", f"a {content} a"))


def _touches_word(text: str, start: int, stop: int) -> bool:
    around = text[max(start - 1, 0) : start], text[stop : stop + 1]
    return any(re.match(r"\w", char) for char in around)
