"""Looks at files of records: JSON lines, JSON, Parquet; also the JSON files that are transcripts of Whisper."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from outgrow.recipes.schema.sources import TextShape
from outgrow.streaming.detection.files import MAX_RECORDS, SAMPLE_CHARS, WHOLE_BYTES, Look
from outgrow.streaming.detection.records import Records, list_within, of_records
from outgrow.streaming.detection.whole_looks import whole_look
from outgrow.streaming.sources.document import BadRecordError
from outgrow.streaming.sources.json_files import record_spans
from outgrow.streaming.sources.json_text import parse
from outgrow.streaming.sources.lines import line_blocks
from outgrow.streaming.sources.transcript import whisper_cues

_ROWS = 64
"""Rows of a Parquet file that are looked at."""


def jsonl_look(path: Path, name: str) -> Look:
    """What the first lines are."""
    block = next(line_blocks(path), None)
    lines = block.lines() if block is not None and not block.too_long else iter(())
    found: list[tuple[str, Any]] = []
    for number, line in islice(lines, MAX_RECORDS):
        if line.strip():
            found.append((f"{name}#{number}", _value(line)))
    return _of(name, "jsonl", of_records(found), "no line of it is a record of a shape that is known")


def json_look(path: Path, name: str) -> Look:
    """What the file is: a list of records, an object that holds one, one record, or a transcript."""
    with open(path, "rb") as file:
        first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if first == b"[":
            found: list[tuple[str, Any]] = []
            for span in islice(record_spans(path, ()), MAX_RECORDS):
                if found and span.start + span.num_bytes > WHOLE_BYTES:
                    break
                file.seek(span.start)
                found.append((f"{name}#{span.number}", _value(file.read(min(span.num_bytes, WHOLE_BYTES)))))
            if _is_whisper([value for _, value in found]):
                return whole_look(path, name, "transcript")
            return _of(name, "json", of_records(found), "its list holds no records of a shape that is known")
    if path.stat().st_size > WHOLE_BYTES:
        return Look(name=name, kind="", problem="one object of many megabytes: name the key of its list as records")
    value = _value(path.read_bytes())
    if isinstance(value, Exception):
        raise value
    if _is_whisper(value):
        return whole_look(path, name, "transcript")
    alone = of_records([(name, value)])
    if alone.shape is not None and not isinstance(alone.shape, TextShape):
        return _of(name, "json", alone, "")
    key, items = list_within(value)
    if key:
        found = [(f"{name}#{number}", item) for number, item in enumerate(items[:MAX_RECORDS], 1)]
        return _of(name, "json", of_records(found), f"the list '{key}' holds no records of a shape that is known", key)
    return _of(name, "json", alone, "it holds neither records of a shape that is known nor a transcript of Whisper")


def parquet_look(path: Path, name: str) -> Look:
    """What the first rows are."""
    from outgrow.streaming.sources.parquet import first_records  # pyarrow is slow to import

    columns, rows = first_records(path, _ROWS)
    found = [(f"{name}#{number}", row) for number, row in enumerate(rows, 1)]
    return _of(name, "parquet", of_records(found), f"no column of it is known; columns: {', '.join(columns)}")


def _of(name: str, kind: str, found: Records, otherwise: str, key: str = "") -> Look:
    """The look at a file of records, ``otherwise`` its problem where they have no shape that is known."""
    if found.shape is None:
        first = found.misfit if found.num_misfits == found.num_records else ""
        return Look(name=name, kind="", problem=first or otherwise)
    return Look(
        name=name,
        kind=kind,
        shape=found.shape,
        records=key,
        num_records=found.num_records,
        num_fit=found.num_fit,
        num_misfits=found.num_misfits,
        misfit=found.misfit,
        text=found.text[:SAMPLE_CHARS],
    )


def _value(data: bytes) -> Any:
    """The JSON value, or the error that it is none."""
    try:
        return parse(data.removeprefix(b"\xef\xbb\xbf").decode())
    except BadRecordError as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRecordError(f"byte {error.start} is not UTF-8", reason="undecodable")


def _is_whisper(value: Any) -> bool:
    try:
        return bool(whisper_cues(value))
    except BadRecordError:
        return False
