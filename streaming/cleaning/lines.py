"""Steps that mend lines of OCR and PDF: words divided at line ends, and lines broken within paragraphs."""

from __future__ import annotations

import re
from itertools import pairwise

# --- hyphenation ------------------------------------------------------------------------------------------------------

_DIVIDED = re.compile(r"(?<=[^\W\d_])([-\u2010\u00ad])[ \t]*\n[ \t]*(?=([^\W\d_]+))")
_SOFT_HYPHEN = "\u00ad"
_HYPHENATED = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)+")
_WORD_CHARS = 40
"""No word before a hyphen is longer."""

_ASKING = (
    "кто кого кому кем ком что чего чему чем чём где куда откуда когда как почему зачем отчего сколько чей чья чьё чье чьи"
)
_PRONOUNS = frozenset(_ASKING.split()) | {
    stem + ending
    for stem, endings in (
        ("как", "ой ого ому им ом ая ую ие их ими ое"),
        ("котор", "ый ого ому ым ом ая ой ую ые ых ыми ое"),
        ("чь", "его ему им ём ей ю их ими"),
    )
    for ending in endings.split()
}
_ASK_FOR = "ну дай давай на иди пойди поди смотри посмотри глянь взгляни скажи расскажи покажи стой постой погоди подожди"
_ASKED = frozenset(_ASK_FOR.split())
_ASKED_ENDINGS = ("йте", "ите", "ьте")
_ALWAYS_AFTER_HYPHEN = frozenset(("либо", "нибудь"))
_KEPT_PAIRS = frozenset((("из", "за"), ("из", "под")))
_SUSPENDED = frozenset(("und", "oder", "bzw", "and", "и", "или"))


def join_divided_words(text: str) -> tuple[str, int]:
    """The text with words joined that a hyphen divides at the end of a line, and without soft hyphens; changes are the joins
    and the soft hyphens.

    The hyphen stays where it belongs to the word: before a capital, in ``кто-то`` and its like, and in words that the text
    writes with a hyphen elsewhere.
    """
    parts: list[str] = []
    done = count = 0
    hyphenated: frozenset[str] | None = None
    for found in _DIVIDED.finditer(text):
        if hyphenated is None:
            hyphenated = frozenset(word.lower() for word in _HYPHENATED.findall(text))
        parts += (text[done : found.start()], _between(_word_before(text, found.start()), found[1], found[2], hyphenated))
        done = found.end()
        count += 1
    text = "".join([*parts, text[done:]])
    soft = text.count(_SOFT_HYPHEN)
    return (text.replace(_SOFT_HYPHEN, "") if soft else text), count + soft


def _between(before: str, hyphen: str, after: str, hyphenated: frozenset[str]) -> str:
    """What stands between the parts of a divided word once they are on one line."""
    if hyphen == _SOFT_HYPHEN:
        return ""
    if after in _SUSPENDED:
        return "- "
    one, other = before.lower(), after.lower()
    if after[0].isupper() and not before.isupper():
        return "-"
    if (one, other) in _KEPT_PAIRS or _is_particle(one, other) or f"{one}-{other}" in hyphenated:
        return "-"
    return ""


def _is_particle(before: str, after: str) -> bool:
    """Whether a hyphen belongs between the two: ``кто-то``, ``что-либо``, ``кое-где``, ``дай-ка``, ``всё-таки``; not in
    ``мес-то``, ``руч-ка`` and ``а-таки``, which are divided words."""
    if after == "то":
        return before in _PRONOUNS
    if after == "ка":
        return before in _ASKED or before.endswith(_ASKED_ENDINGS)
    if after == "таки":
        return len(before) > 1
    return after in _ALWAYS_AFTER_HYPHEN or (before in ("кое", "кой") and after in _PRONOUNS)


def _word_before(text: str, end: int) -> str:
    start = end
    while start > max(0, end - _WORD_CHARS) and text[start - 1].isalpha():
        start -= 1
    return text[start:end]


# --- line_joins -------------------------------------------------------------------------------------------------------

_WIDTHS = range(45, 201)
"""Characters of a full line in text that was broken into lines; lines of verse are shorter, paragraphs longer."""
_FULL, _MOST = 0.75, 1.25
"""A line from ``_FULL`` to ``_MOST`` of the usual width was broken because it was full; a shorter one ends a paragraph."""
_BEGINS_ANEW = re.compile(r"[—–•*#>|`+·■▪◦]|(?:-|\(?\d{1,3}[.)]|\(?[^\W\d_][.)])(?:\s|$)")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def join_lines(text: str) -> tuple[str, int]:
    """The text with lines joined that stand in one paragraph; changes are the joins.

    A paragraph ends at an empty line, after a short line, and before a line that is indented more, or begins with a dash, a
    bullet or a number. Text whose lines were never broken, and verse, stay as they are.
    """
    lines = text.split("\n")
    lengths = sorted(len(line.strip()) for line in lines if line and not line.isspace())
    width = lengths[len(lengths) * 9 // 10] if lengths else 0
    if width not in _WIDTHS:
        return text, 0
    parts = [lines[0]]
    count = 0
    for before, after in pairwise(lines):
        if _go_on(before, after, width):
            parts += (_gap(before.rstrip(), after.lstrip()), after.lstrip())
            parts[-3] = parts[-3].rstrip()
            count += 1
        else:
            parts += ("\n", after)
    return "".join(parts), count


def _go_on(before: str, after: str, width: int) -> bool:
    """Whether the second line goes on with the paragraph of the first."""
    one, other = before.strip(), after.strip()
    if not one or not other or not _FULL * width <= len(one) <= _MOST * width:
        return False
    deeper = len(after) - len(after.lstrip()) > len(before) - len(before.lstrip())
    return not deeper and not _BEGINS_ANEW.match(other)


def _gap(before: str, after: str) -> str:
    """What stands between two joined lines: nothing after the hyphen of a word, nor between letters of scripts without
    spaces."""
    if before[-1] == "-" and before[-2:-1].isalpha():
        return ""
    return "" if _CJK.match(before[-1]) and _CJK.match(after[0]) else " "
