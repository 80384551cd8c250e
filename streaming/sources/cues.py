"""Cues of subtitles: SubRip (.srt) and WebVTT, as people and programs write them, with the speakers that they name."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from outgrow.streaming.sources.document import BadRecordError

_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_HALF_TIMING = re.compile(r"\s*\d{1,4}[:.,]\d")
_COUNTER = re.compile(r"\s*\d+\s*")
_ASIDE = re.compile(r"(?:WEBVTT|NOTE|STYLE|REGION)(?:\s.*)?")
_VTT_TAG = re.compile(r"</?(?:c|i|b|u|v|ruby|rt|lang)(?:[.\s][^<>]{0,500})?>|<(?:\d{1,4}:)?\d\d:\d\d\.\d{3}>")
_SRT_TAG = re.compile(r"</?(?:i|b|u|s|font)(?:\s[^<>]{0,500})?>|\{\\[^{}]{0,500}\}", re.IGNORECASE)
_VOICE = re.compile(r"<v(?:\.[^\s<>]{1,100})?\s([^<>]{1,200})>")
_NAME = r"[A-ZА-ЯЁ][\w.'’-]{0,40}(?: [A-ZА-ЯЁ][\w.'’-]{0,40}){0,3}"
_DASH = r"(?:[-–—]\s*)?"
_SURE_LABEL = re.compile(
    rf"{_DASH}(?:\[([^\[\]:]{{1,60}})\]:\s*|((?:speaker|спикер|говорящий)[ _]?\d{{1,3}}):\s*)", re.IGNORECASE
)
_LABEL = re.compile(rf"{_DASH}({_NAME}):\s+")
_LABELS_OF_ONE_NAME = 2
"""A word with a colon that begins a line is a speaker where it comes as often as this."""
_ROLLING_SHARE = 0.5
_ROLLING_CUES = 6
"""Captions roll, each cue repeating lines of the one before, where that is so for this share of this many cues."""


@dataclass(frozen=True, kw_only=True)
class Cue:
    """Words that are said from ``start`` to ``end`` (seconds), in one line; ``speaker`` is None where nobody is named."""

    start: float
    end: float
    speaker: str | None
    text: str


@dataclass(kw_only=True)
class _Timed:
    """The lines between two time codes, each with the voice that WebVTT gives it."""

    start: float
    end: float
    lines: list[tuple[str | None, str]]


def subtitle_cues(text: str) -> tuple[list[Cue], int]:
    """The cues of a .srt or .vtt file in order; a cue in which several speak becomes several.

    Beside them, how many lines were left out that only repeat the cue before, as captions do that roll. Raises
    ``BadRecordError`` with the line where the file is neither.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    is_vtt = lines[0].removeprefix("\ufeff").startswith("WEBVTT")
    timed = _vtt(lines) if is_vtt else _srt(lines)
    if not timed:
        raise BadRecordError("it holds no subtitles: there is no line such as 00:00:01,000 --> 00:00:02,500")
    repeated = _unroll(timed)
    names = Counter(match[1] for cue in timed for _, line in cue.lines if (match := _LABEL.match(line)))
    speakers = {name for name, count in names.items() if count >= _LABELS_OF_ONE_NAME}
    return [part for cue in timed for part in _parts(cue, speakers)], repeated


def _srt(lines: list[str]) -> list[_Timed]:
    timed: list[_Timed] = []
    for number, line in enumerate(lines):
        if times := _times(line, number):
            if timed and _COUNTER.fullmatch(lines[number - 1]) and timed[-1].lines:
                timed[-1].lines.pop()  # the number of this cue
            timed.append(_Timed(start=times[0], end=times[1], lines=[]))
        elif line.strip():
            if timed:
                timed[-1].lines.append((None, _SRT_TAG.sub("", line).strip()))
            elif not _COUNTER.fullmatch(line.removeprefix("\ufeff")):
                raise BadRecordError("text before the first time code: no subtitles", line=number + 1)
    return timed


def _vtt(lines: list[str]) -> list[_Timed]:
    timed: list[_Timed] = []
    inside = False  # a cue, or else a note, a style or the head of the file
    voice: str | None = None
    for number, line in enumerate(lines):
        begins = number == 0 or not lines[number - 1].strip()  # a block
        if times := _times(line, number):
            timed.append(_Timed(start=times[0], end=times[1], lines=[]))
            inside, voice = True, None
        elif not line.strip():
            inside = inside and line != ""  # a line of spaces belongs to the cue
        elif begins and _times(_next(lines, number), number + 1):
            inside = False  # the name of the next cue
        elif inside:
            for name, words in _voices(line, voice):
                voice = name
                timed[-1].lines.append((name, html.unescape(_VTT_TAG.sub("", words)).strip()))
        elif begins and not _ASIDE.fullmatch(line.removeprefix("\ufeff")):
            raise BadRecordError("neither a cue nor a note: text without a time code before it", line=number + 1)
    return timed


def _next(lines: list[str], number: int) -> str:
    return lines[number + 1] if number + 1 < len(lines) else ""


def _times(line: str, number: int) -> tuple[float, float] | None:
    """Start and end in seconds where the line is a time code. Raises ``BadRecordError`` where it is half of one."""
    if "-->" not in line:
        return None
    match = _TIMING.fullmatch(line)
    if match is None:
        if not _HALF_TIMING.match(line):
            return None
        raise BadRecordError("not a time code; allowed: 00:00:01,000 --> 00:00:02,500", line=number + 1)
    return _seconds(match.groups()[:4]), _seconds(match.groups()[4:])


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return round(whole + int((fraction or "").ljust(3, "0")) / 1000, 3)


def _voices(line: str, voice: str | None) -> Iterator[tuple[str | None, str]]:
    """The parts of a line of WebVTT by who says them; ``voice`` is who spoke before, and speaks on in the same cue."""
    parts = _VOICE.split(line)  # words, name, words, name, words ...
    if parts[0].strip() or len(parts) == 1:
        yield voice, parts[0]
    for name, words in zip(parts[1::2], parts[2::2], strict=True):
        yield " ".join(html.unescape(name).split()), words


def _unroll(timed: list[_Timed]) -> int:
    """Takes out the lines with which each cue repeats the one before, where the captions roll; how many there were."""
    shown = [[words for _, words in cue.lines if words] for cue in timed]
    rolling = sum(bool(before and after and before[-1] == after[0]) for before, after in zip(shown, shown[1:], strict=False))
    if len(timed) < _ROLLING_CUES or rolling < _ROLLING_SHARE * (len(timed) - 1):
        return 0
    repeated = 0
    for cue, before, after in zip(timed[1:], shown, shown[1:], strict=False):
        same = next((n for n in range(min(len(before), len(after)), 0, -1) if before[-n:] == after[:n]), 0)
        cue.lines = [line for line in cue.lines if line[1]][same:]
        repeated += same
    return repeated


def _parts(cue: _Timed, speakers: set[str]) -> Iterator[Cue]:
    """The cue, cut where another speaker begins."""
    speaker: str | None = None
    words: list[str] = []
    for voice, line in cue.lines:
        name, rest = _labelled(line, speakers)
        name = voice or name
        if name is not None and name != speaker:
            if words:
                yield Cue(start=cue.start, end=cue.end, speaker=speaker, text=" ".join(words))
            speaker, words = name, []
        if rest:
            words.append(" ".join(rest.split()))
    if words:
        yield Cue(start=cue.start, end=cue.end, speaker=speaker, text=" ".join(words))


def _labelled(line: str, speakers: set[str]) -> tuple[str | None, str]:
    """The speaker that a line begins with, and what is said."""
    if match := _SURE_LABEL.match(line):
        return (match[1] or match[2]).strip(), line[match.end() :]
    if (match := _LABEL.match(line)) and match[1] in speakers:
        return match[1], line[match.end() :]
    return None, line
