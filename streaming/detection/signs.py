"""Signs in a sample of texts that a cleaning step would find something to do, each with what was counted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_DIVIDED = re.compile(r"[^\W\d_]-\n[^\W\d_]|\u00ad")
_WRAPPED = re.compile(r"[^\W\d_],?\n(?=[a-zа-яё])")
_TIME_CODE = re.compile(r"^\s*[\[(]?\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d{1,3})?(?:[\])]|\s)", re.MULTILINE)
_FILLER = re.compile(r"(?<![\w-])(?:э{1,3}|м{2,3}|uh|um|uhm|erm|hmm)(?![\w-])", re.IGNORECASE)
_MIXED = re.compile(r"(?<!\w)(?:[а-яё]+[aceopxyABCEHKMOPTX]+|[aceopxyABCEHKMOPTX]+[а-яё]+)[а-яё]*(?!\w)")
_FEW_LOOK_ALIKES = 3
_DIVIDED_SHARE = 0.005
_WRAPPED_SHARE = 0.2
"""Shares of lines from which on they were broken by a page, not by the author."""


def clean_steps(kind: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Kinds of the cleaning steps to propose for texts of a kind of source, in order, each with why."""
    lines = sum(text.count("\n") + 1 for text in texts)
    not_nfc = sum(not unicodedata.is_normalized("NFC", text) for text in texts)
    invisible = _count(_INVISIBLE, texts)
    divided, wrapped = _count(_DIVIDED, texts), _count(_WRAPPED, texts)
    paged = kind == "pdf" or (divided > max(2, _DIVIDED_SHARE * lines))
    if not_nfc or kind == "pdf":
        yield "nfc", f"{not_nfc} of {len(texts)} texts have letters and accents apart" if not_nfc else ""
    if invisible or kind == "pdf":
        yield "control_characters", f"{invisible:,} control and invisible characters" if invisible else ""
    if paged:
        yield "hyphenation", f"{divided:,} words divided at line ends"
    if kind == "pdf" or (kind in ("text", "docx") and paged and wrapped > _WRAPPED_SHARE * lines):
        yield "line_joins", f"{wrapped:,} of {lines:,} lines go on in the next"
    if kind == "transcript":
        if times := _count(_TIME_CODE, texts):
            yield "time_codes", f"{times:,} time codes in the words"
        if fillers := _count(_FILLER, texts):
            yield "filler_words", f"{fillers:,} of э, мм, uh, um and such"
    if (mixed := _count(_MIXED, texts)) >= _FEW_LOOK_ALIKES:
        yield "look_alikes", f"{mixed:,} Cyrillic words with Latin letters in them"


def _count(pattern: re.Pattern[str], texts: Sequence[str]) -> int:
    return sum(1 for text in texts for _ in pattern.finditer(text))
