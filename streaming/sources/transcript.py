"""Source ``transcript``: subtitles (.srt, .vtt) and Whisper's JSON, each file one document with a line a cue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outgrow.recipes.schema.sources import TranscriptSource
from outgrow.streaming.sources import json_text
from outgrow.streaming.sources.cues import Cue, subtitle_cues
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.encoding import read_text
from outgrow.streaming.sources.text import encoding_meta

MAX_CHARS = 64 * 1024 * 1024
"""Longest file of one transcript (days of speech with the times of each word): what it says takes ten times the memory."""


@dataclass(frozen=True, kw_only=True)
class TranscriptReader:
    """A transcript a file."""

    encoding: str
    speakers: Literal["keep", "drop"]
    times: Literal["keep", "drop"]

    def read(self, path: Path, name: str) -> Iterator[Document]:
        text, encoding = read_text(path, self.encoding)
        if len(text) > MAX_CHARS:
            raise BadRecordError(f"{len(text):,} characters are too long for a transcript; at most {MAX_CHARS:,}")
        meta = encoding_meta(encoding)
        if path.suffix.lower() == ".json":
            value = json_text.parse(text)
            cues = whisper_cues(value)
            if isinstance(language := _language(value), str):
                meta["language"] = language
        else:
            cues, repeated = subtitle_cues(text)
            if repeated:
                meta["repeated_lines"] = repeated
        lines = "\n".join(self._lines(cues))
        yield Document(content=lines, source=name, meta={**meta, "cues": [[cue.start, cue.end, cue.speaker] for cue in cues]})

    def _lines(self, cues: list[Cue]) -> Iterator[str]:
        speaker: str | None = None
        for cue in cues:
            time = f"[{_clock(cue.start)}] " if self.times == "keep" else ""
            changed = self.speakers == "keep" and cue.speaker not in (None, speaker)
            yield f"{time}{cue.speaker}: {cue.text}" if changed else f"{time}{cue.text}"
            speaker = cue.speaker or speaker


def reader(source: TranscriptSource) -> TranscriptReader:
    """How files of the source are read."""
    return TranscriptReader(encoding=source.encoding, speakers=source.speakers, times=source.times)


def whisper_cues(value: Any) -> list[Cue]:
    """The segments with text of what Whisper, WhisperX, faster-whisper (a list of segments) or whisper.cpp wrote.

    Raises ``BadRecordError`` where ``value`` is no such thing.
    """
    segments = value.get("segments", value.get("transcription")) if isinstance(value, dict) else value
    if not isinstance(segments, list) or not segments:
        raise BadRecordError("it is no transcript of Whisper: it holds no list of segments")
    cues = [_segment(segment, number) for number, segment in enumerate(segments)]
    return [cue for cue in cues if cue.text]


def _segment(segment: Any, number: int) -> Cue:
    """A segment with ``start`` and ``end`` in seconds; whisper.cpp gives ``offsets``, from and to, in milliseconds."""
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        raise BadRecordError(f"it is no transcript of Whisper: segment {number} has no text")
    offsets = segment.get("offsets")
    if isinstance(offsets, dict):
        times, unit = (offsets.get("from"), offsets.get("to")), 1000
    else:
        times, unit = (segment.get("start"), segment.get("end")), 1
    try:
        seconds = [round(time / unit, 3) for time in times if isinstance(time, int | float) and not isinstance(time, bool)]
    except OverflowError:  # an integer beyond a float
        seconds = []
    if len(seconds) != 2:
        raise BadRecordError(f"it is no transcript of Whisper: segment {number} has no start and end")
    speaker = segment.get("speaker")
    return Cue(
        start=seconds[0],
        end=seconds[1],
        speaker=speaker if isinstance(speaker, str) and speaker else None,
        text=" ".join(segment["text"].split()),
    )


def _language(value: Any) -> Any:
    """The language that was recognised, where it is named."""
    if not isinstance(value, dict):
        return None
    result = value.get("result")
    return value.get("language", result.get("language") if isinstance(result, dict) else None)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
