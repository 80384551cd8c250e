"""Steps for transcripts of speech: filler words and time codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# --- filler_words -----------------------------------------------------------------------------------------------------

_BEFORE_SENTENCE = '.!?…\n—–-«"“„(['
_UNITS = frozenset(("м", "мм", "m", "mm"))
_AFTER_NUMBER = re.compile(r"(?<=\d)[ \xa0]?$")
_COMMA = re.compile(r"[ \t]*,")
_ELLIPSIS = re.compile(r"[ \t]*(?:…|\.\.\.)")
_GOES_ON = re.compile(r"[ \t]*[^\W\d_A-ZА-ЯЁ]")
_SPACES = re.compile(r"[ \t]*")
_LETTER = re.compile(r"[^\W\d_]")


def filler_dropper(words: Sequence[str]) -> Callable[[str], tuple[str, int]]:
    """A step that leaves out ``words``, also drawn out (``э-э``), whatever their case, with the commas around them; changes are
    words left out.

    Where one begins a sentence, the next word gets its capital. Units, initials and exclamations stay: ``5 м``, ``М. Горький``,
    ``Hmm!``.
    """
    spelled = [r"[ \t]+".join(map(re.escape, word.split())) for word in words if word.strip()]
    if not spelled:
        return lambda text: (text, 0)
    one = "|".join(sorted(spelled, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])(?:{one})(?:-(?:{one}))*(?![\w-])", re.IGNORECASE)
    return lambda text: _Dropping(text).drop(pattern)


class _Dropping:
    """A text on its way through ``filler_words``."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._parts: list[str] = []
        self._done = 0
        self._last = "\n"
        """The last character that was kept."""
        self._capital = False
        """Whether the next letter begins a sentence whose first word was left out."""

    def drop(self, pattern: re.Pattern[str]) -> tuple[str, int]:
        """The text without what ``pattern`` finds, and how often that was."""
        count = sum(self._drop(found) for found in pattern.finditer(self._text))
        self._keep(len(self._text))
        return "".join(self._parts), count

    def _drop(self, found: re.Match[str]) -> bool:
        text, (start, stop) = self._text, found.span()
        if start < self._done or self._stays(found[0], start, stop):
            return False
        left = start
        while left > self._done and text[left - 1] in " \t":
            left -= 1
        comma = left > self._done and text[left - 1] == ","
        begins_line = not comma and (text[left - 1] if left > self._done else self._last) == "\n"
        if begins_line and text.startswith(".", stop) and not text.startswith("...", stop):
            return False  # a full stop alone would be left
        self._keep(start if begins_line else left - comma)
        self._capital |= found[0][0].isupper() and self._last in _BEFORE_SENTENCE
        begins = begins_line or (left == start and not comma)
        self._done = self._after(stop, begins=begins)
        return True

    def _stays(self, word: str, start: int, stop: int) -> bool:
        text = self._text
        if text[stop : stop + 1] in ("!", "?"):
            return True
        if word.lower() in _UNITS and _AFTER_NUMBER.search(text, max(0, start - 2), start):
            return True
        shortened = word.isupper() or word.lower() in _UNITS  # an initial, or short for a word
        return len(word) == 1 and shortened and text.startswith(".", stop) and not text.startswith("...", stop)

    def _after(self, stop: int, *, begins: bool) -> int:
        """Where the text goes on after a word that is left out."""
        text = self._text
        if comma := _COMMA.match(text, stop):
            stop = comma.end()
        elif (ellipsis := _ELLIPSIS.match(text, stop)) and (begins or _GOES_ON.match(text, ellipsis.end())):
            stop = ellipsis.end()
        spaces = _SPACES.match(text, stop)
        return spaces.end() if begins and spaces else stop

    def _keep(self, stop: int) -> None:
        """Keep the text up to ``stop``."""
        kept = self._text[self._done : stop]
        if not kept:
            return
        if self._capital and (letter := _LETTER.search(kept)):
            kept = kept[: letter.start()] + letter[0].upper() + kept[letter.end() :]
            self._capital = False
        self._parts.append(kept)
        self._last = kept.rstrip(" \t")[-1:] or self._last


# --- time_codes -------------------------------------------------------------------------------------------------------

_TIME = r"(?:\d{1,3}:)?\d{1,2}:\d{2}(?:[.,]\d{1,3})?"
_LONG_TIME = r"\d{1,3}:\d{2}:\d{2}(?:[.,]\d{1,3})?"
_SPAN = rf"{_TIME}(?:[ \t]{{0,3}}(?:-->|[-–—])[ \t]{{0,3}}{_TIME})?"
_ARROW = rf"(?<![\d:.,]){_TIME}[ \t]{{0,3}}-->(?:[ \t]{{0,3}}{_TIME})?"
_WHOLE_LINE = re.compile(rf"^(?:{_TIME}[ \t]{{0,3}}-->(?:[ \t]{{0,3}}{_TIME}[^\n]*)?|{_TIME})[ \t]*(?:\n|\Z)", re.MULTILINE)
_WITHIN = re.compile(rf"\[{_SPAN}\]|\({_SPAN}\)|<{_TIME}>|{_ARROW}")
_LEADING = re.compile(rf"^{_LONG_TIME}(?![\d:])[ \t]*", re.MULTILINE)


def drop_time_codes(text: str) -> tuple[str, int]:
    """The text without time codes; changes are codes.

    These are: times in brackets, cues (``00:01:02 --> 00:01:05``, with their line where they begin it), times alone on a
    line, and times with hours at the beginning of a line. A time within a sentence stays.
    """
    if ":" not in text:
        return text, 0
    text, lines = _WHOLE_LINE.subn("", text)
    text, inner = _without_codes(text)
    text, leading = _LEADING.subn("", text)
    return text, lines + inner + leading


def _without_codes(text: str) -> tuple[str, int]:
    """The text without codes within lines: one space is left between words, none before a sign or at the ends of a line."""
    parts: list[str] = []
    done = count = 0
    for found in _WITHIN.finditer(text):
        start, stop = found.span()
        spaces = _SPACES.match(text, stop)
        after = spaces.end() if spaces else stop
        kept = text[done:start]
        if after == len(text) or text[after] in "\n.,;:!?…)":
            kept, stop = kept.rstrip(" \t"), after
            while not kept and parts:  # codes in a row
                kept = parts.pop().rstrip(" \t")
        elif not kept or kept[-1] in " \t\n":
            stop = after
        parts.append(kept)
        done = stop
        count += 1
    return ("".join([*parts, text[done:]]), count) if count else (text, 0)
