"""Subtitles and Whisper's JSON: cues, speakers and times of real files, and broken ones that are named with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pysubs2
import pytest
from read_files import FILES, read_one, refused, text_of

from outgrow.streaming.sources import transcript

RUSSIAN = """\
Утром над рекой стоял туман, густой, как молоко. Лодка шла медленно, и никто не говорил ни слова. Потом лоцман поднял руку и
сказал, чтобы гребцы остановились: впереди показался берег, которого не было ни на одной карте. В городе живут люди.
"""
WHISPER_TEXT = "Сегодня — туман.\nIt is seen & felt,\nВопрос: видно ли берег?"
WHISPER_CUES = [[0.0, 3.5, None], [3.5, 7.25, None], [7.25, 3725.0, None]]
WHISPERX_CUES = [[0.0, 1.5, "SPEAKER_00"], [2.0, 3.5, "SPEAKER_00"], [4.0, 5.5, "SPEAKER_01"]]


def srt(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def cues_of(path: Path, **options: Any) -> list[list[Any]]:
    cues = read_one("transcript", path, **options).meta["cues"]
    assert json.loads(json.dumps(cues)) == cues
    return list(cues)


@pytest.mark.parametrize("kind", ["json", "srt", "vtt"])
def test_transcripts_of_whisper(kind: str) -> None:
    document = read_one("transcript", FILES / f"whisper.{kind}")
    assert document.content == WHISPER_TEXT
    assert document.source == f"whisper.{kind}"
    assert document.meta == ({"language": "ru"} if kind == "json" else {}) | {"cues": WHISPER_CUES}


@pytest.mark.parametrize("kind", ["json", "srt", "vtt"])
def test_transcripts_of_whisperx_with_speakers(kind: str) -> None:
    path = FILES / f"whisperx.{kind}"
    assert cues_of(path) == WHISPERX_CUES
    assert text_of("transcript", path) == "SPEAKER_00: Туман?\nТуман.\nSPEAKER_01: Ждём."
    assert text_of("transcript", path, speakers="drop") == "Туман?\nТуман.\nЖдём."
    assert cues_of(path, speakers="drop") == WHISPERX_CUES


def test_times_begin_lines_where_they_are_kept() -> None:
    assert text_of("transcript", FILES / "whisperx.srt", times="keep") == (
        "[00:00:00] SPEAKER_00: Туман?\n[00:00:02] Туман.\n[00:00:04] SPEAKER_01: Ждём."
    )
    lines = text_of("transcript", FILES / "webvtt.vtt", times="keep", speakers="drop")
    assert lines.splitlines()[-1] == "[01:00:00] Fog <thick>"


def test_subtitles_of_another_program_with_names_and_formatting() -> None:
    document = read_one("transcript", FILES / "srt.srt")
    assert document.content == "Лоцман: Не греби.\nАнна: Почему?\nТуман, он густой\nЛоцман: Тише.\nАнна: 5 < 7 & 3"
    assert document.meta["cues"] == [
        [1.0, 2.0, "Лоцман"],
        [1.0, 2.0, "Анна"],
        [2.0, 3.0, None],
        [3.0, 4.0, "Лоцман"],
        [4.0, 5.0, "Анна"],
    ]


def test_voices_of_webvtt() -> None:
    document = read_one("transcript", FILES / "webvtt.vtt")
    assert document.content == "Анна Серова: Where is the shore?\nЛоцман: Тише & тише.\nАнна Серова: Да.\nFog <thick>"
    assert document.meta["cues"] == [
        [1.0, 2.0, "Анна Серова"],
        [2.0, 3.5, "Лоцман"],
        [2.0, 3.5, "Анна Серова"],
        [3600.0, 3601.0, None],
    ]


@pytest.mark.parametrize("name", ["whisper.srt", "whisper.vtt", "srt.srt"])
def test_times_and_words_are_those_of_another_reader(name: str) -> None:
    twin = pysubs2.load(str(FILES / name), encoding="utf-8-sig")
    document = read_one("transcript", FILES / name)
    spans = list(dict.fromkeys((start, end) for start, end, _ in document.meta["cues"]))
    assert spans == [(event.start / 1000, event.end / 1000) for event in twin]
    words = " ".join(event.plaintext for event in twin).replace("- ", "").split()
    assert str(document.content).split() == words


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("1\n00:00:01,000 --> 00:00:02,000\na\n\nb\n\n2\n00:00:03,000 --> 00:00:04,000\nc\n", "a b\nc"),
        ("00:01.000 --> 00:02.000\na\n2\n00:00:03,000 --> 00:00:04,000 X1:40\nc\n", "a\nc"),
        ("1\r\n0:00:01,0 --> 0:00:02,0\r\n42\r\n\r\n2\r\n0:0:3,0 --> 0:0:4,0\r\nc", "42\nc"),
        ("1\n00:00:01,000 --> 00:00:02,000\n\n2\n00:00:03,000 --> 00:00:04,000\n<font color='red'>c</font>\n", "c"),
        ("1\n00:00:01 --> 00:00:02\nsee 1 --> 2, a --> b\n", "see 1 --> 2, a --> b"),
        ("1\n00:00:01 --> 00:00:02\nNote: x\n\n2\n00:00:03 --> 00:00:04\nAnd: y\n", "Note: x\nAnd: y"),
        ("1\n00:00:01 --> 00:00:02\nСпикер 1: x\n\n2\n00:00:03 --> 00:00:04\n[Jo]: y\n", "Спикер 1: x\nJo: y"),
    ],
)
def test_subrip_as_people_write_it(tmp_path: Path, text: str, lines: str) -> None:
    path = tmp_path / "a.srt"
    path.write_bytes(text.encode())
    assert text_of("transcript", path) == lines


def test_rolling_captions_are_told_once(tmp_path: Path) -> None:
    words = ["so today we", "will look at fog", "as it comes", "over the river", "in the morning"]
    cues = ["WEBVTT\nKind: captions\nLanguage: en\n"]
    for second, (before, line) in enumerate(zip(["", *words], words, strict=False)):
        tagged = line.replace(" ", f"<00:00:0{second}.500><c> ", 1) + "</c>"
        cues.append(f"00:00:0{second}.000 --> 00:00:0{second}.990 align:start position:0%\n{before or ' '}\n{tagged}\n")
        cues.append(f"00:00:0{second}.990 --> 00:00:0{second + 1}.000 align:start position:0%\n{line}\n \n")
    document = read_one("transcript", srt(tmp_path / "a.vtt", "\n".join(cues)))
    assert document.content == "\n".join(words)
    assert document.meta["repeated_lines"] == 9
    assert [cue[:2] for cue in document.meta["cues"]] == [[float(second), second + 0.99] for second in range(5)]


def test_speech_that_repeats_itself_is_no_rolling_caption(tmp_path: Path) -> None:
    words = ["да", "да", "нет", "нет", "да", "тише", "ещё", "тише", "вот"]
    blocks = [f"{n}\n00:00:{n:02},000 --> 00:00:{n + 1:02},000\n{word}\n" for n, word in enumerate(words, start=1)]
    document = read_one("transcript", srt(tmp_path / "a.srt", "\n".join(blocks)))
    assert document.content == "\n".join(words)
    assert "repeated_lines" not in document.meta


@pytest.mark.parametrize(
    ("value", "cues"),
    [
        ([{"start": 0, "end": 1, "text": " a "}, {"start": 1, "end": 2, "text": "  "}], [[0, 1, None]]),
        ({"transcription": [{"offsets": {"from": 100, "to": 2500}, "text": "a"}]}, [[0.1, 2.5, None]]),
        ({"segments": [{"start": 0.1234567, "end": 1, "text": "a", "speaker": "B"}]}, [[0.123, 1, "B"]]),
    ],
)
def test_json_of_programs_around_whisper(tmp_path: Path, value: Any, cues: list[Any]) -> None:
    path = srt(tmp_path / "a.json", json.dumps(value))
    assert cues_of(path) == cues
    assert text_of("transcript", path, speakers="drop") == "a"


def test_the_encoding_is_detected(tmp_path: Path) -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\n" + RUSSIAN
    (tmp_path / "a.srt").write_bytes(text.encode("cp1251"))
    assert read_one("transcript", tmp_path / "a.srt").meta["encoding"] == "cp1251"


# --- broken transcripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message", "line"),
    [
        ("a.json", "{", "it is not JSON", 0),
        ("a.json", "[" * 100_000, "nested too deeply", 0),
        ("a.json", '{"messages": []}', "no transcript of Whisper: it holds no list of segments", 0),
        ("a.json", '"words"', "no transcript of Whisper: it holds no list of segments", 0),
        ("a.json", '{"segments": [{"start": 0, "end": 1}]}', "segment 0 has no text", 0),
        ("a.json", '[{"start": 0, "end": "1", "text": "a"}]', "segment 0 has no start and end", 0),
        ("a.json", '[{"start": 0, "end": true, "text": "a"}]', "segment 0 has no start and end", 0),
        ("a.json", '[{"start": 0, "end": %s, "text": "a"}]' % ("9" * 400), "segment 0 has no start and end", 0),
        ("a.srt", "", "it holds no subtitles", 0),
        ("a.srt", "\n\nhello\n", "text before the first time code", 3),
        ("a.srt", "1\n00:00:01,000 -> 00:00:02,000\na", "text before the first time code", 2),
        ("a.srt", "1\n00:00:01,000 --> 00:00:02,000\na\n\n2\n00:00:03,000 --> soon\nb", "not a time code", 6),
        ("a.vtt", "WEBVTT\n\nhello\n", "text without a time code before it", 3),
        ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:02.000\na\n\nb\n", "text without a time code before it", 6),
        ("a.vtt", "WEBVTT\n", "it holds no subtitles", 0),
    ],
)
def test_broken_transcripts_are_named(tmp_path: Path, name: str, text: str, message: str, line: int) -> None:
    assert refused("transcript", srt(tmp_path / name, text), message).line == line


def test_length_is_bounded_and_bytes_in_doubt_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nПривет".encode("koi8-r"))
    assert refused("transcript", tmp_path / "a.srt", "its encoding is in doubt").reason == "undecodable"
    monkeypatch.setattr(transcript, "MAX_CHARS", 100)
    refused("transcript", FILES / "whisper.json", "1,[0-9]{3} characters|[0-9]{3} characters are too long for a transcript")


def test_marks_that_never_close_are_read_in_good_time(tmp_path: Path) -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\n" + "<i {\\a [A A " * 100_000
    assert len(text_of("transcript", srt(tmp_path / "a.srt", text))) == 12 * 100_000 - 1
    text = "WEBVTT\n\n00:01.000 --> 00:02.000\n" + "<v <c &amp " * 100_000
    assert len(text_of("transcript", srt(tmp_path / "a.vtt", text))) == 8 * 100_000 - 1
