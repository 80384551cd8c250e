"""Steps that look at characters: composed letters, controls and odd spaces, letters of another script that look alike."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_MARKS_IN_A_ROW = 64
"""Longer rows of combining marks are no text, and are left alone: ordering them takes time that grows with the square."""

# --- nfc --------------------------------------------------------------------------------------------------------------


def compose(text: str) -> tuple[str, int]:
    """The text in Unicode normal form C; changes are words that it changed."""
    if text.isascii():
        return text, 0
    parts = _long_rows().split(text)  # the rows stand at odd places
    changed = 0
    for at in range(0, len(parts), 2):
        if not unicodedata.is_normalized("NFC", parts[at]):
            words = sum(not unicodedata.is_normalized("NFC", word) for word in parts[at].split())
            changed += max(words, 1)  # none: a space that has two codes
            parts[at] = unicodedata.normalize("NFC", parts[at])
    return "".join(parts) if changed else text, changed


@cache
def _long_rows() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.combining(chr(code)))
    rare = "\U00010000-\U0001efff"  # old scripts: their marks one by one would make the search ten times slower
    return re.compile(f"([{marks}{rare}]{{{_MARKS_IN_A_ROW + 1},}})")


# --- control_characters -----------------------------------------------------------------------------------------------

_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_ODD_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff\U000e0001]"
    # Joiners shape emoji and the scripts of Asia; after Latin, Greek, Cyrillic and signs they do nothing.
    "|(?<![\u0590-\u1fff\u200c\u200d\u2190-\U0010ffff])[\u200c\u200d]+"
)


def clear_controls(text: str) -> tuple[str, int]:
    """The text without control and invisible characters, line ends as ``\\n`` and odd spaces as a space; changes are
    characters.

    Soft hyphens stay: they tell the step ``hyphenation`` what to join.
    """
    text, invisible = _INVISIBLE.subn("", text)
    text, ends = _LINE_END.subn("\n", text)
    text, spaces = _ODD_SPACE.subn(" ", text)
    return text, invisible + ends + spaces


# --- look_alikes ------------------------------------------------------------------------------------------------------

_LATIN_LIKE, _CYRILLIC_LIKE = "ABCEHKMOPTXYaceopxykiIëË", "АВСЕНКМОРТХУасеорхукіІёЁ"
_TO_CYRILLIC = str.maketrans(_LATIN_LIKE, _CYRILLIC_LIKE)
_TO_LATIN = str.maketrans(_CYRILLIC_LIKE, _LATIN_LIKE)
_LATIN, _CYRILLIC = "A-Za-zÀ-ÖØ-öø-ɏ", "\u0400-\u0481\u048a-\u052f"
_MIXED = re.compile(f"[{_LATIN}](?=[{_CYRILLIC}])|[{_CYRILLIC}](?=[{_LATIN}])")
_WORD = re.compile(f"[{_LATIN}{_CYRILLIC}]+")
_ONLY_LATIN = re.compile(f"(?![{_LATIN_LIKE}])[{_LATIN}]")
_ONLY_CYRILLIC = re.compile(f"(?![{_CYRILLIC_LIKE}])[{_CYRILLIC}]")
_LETTER = re.compile(f"[{_LATIN}{_CYRILLIC}]")
_CYRILLIC_LETTER = re.compile(f"[{_CYRILLIC}]")


def unify_look_alikes(text: str) -> tuple[str, int]:
    """The text with words that mix Latin and Cyrillic letters in the one script that they can be in; changes are words.

    A word with a letter that one script alone has is of that script, if all its other letters look like letters of it. Of a
    word without such a letter, two thirds decide; what stays in doubt stays as it is.
    """
    parts: list[str] = []
    done = count = 0
    while (found := _MIXED.search(text, done)) is not None:
        start = found.start()
        while start > done and _LETTER.match(text, start - 1):
            start -= 1
        word = _WORD.match(text, start)
        assert word is not None
        unified = _unified(word[0])
        count += unified != word[0]
        parts += (text[done:start], unified)
        done = word.end()
    return "".join([*parts, text[done:]]), count


def _unified(word: str) -> str:
    latin, cyrillic = _ONLY_LATIN.search(word), _ONLY_CYRILLIC.search(word)
    if latin and cyrillic:
        return word
    if not latin and not cyrillic:
        share = len(_CYRILLIC_LETTER.findall(word)) / len(word)
        if 1 / 3 < share < 2 / 3:
            return word
        return word.translate(_TO_CYRILLIC if share > 1 / 2 else _TO_LATIN)
    return word.translate(_TO_CYRILLIC if cyrillic else _TO_LATIN)
