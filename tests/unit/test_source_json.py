"""JSON files: where their records lie is found as a slow twin finds it, and what does not fit costs as little as can be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opened_sources import dropped, everything, kept, opened, refused, texts

from outgrow.streaming.sources import Document, Dropped
from outgrow.streaming.sources.json_files import record_spans


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks that end within everything, and many units."""
    monkeypatch.setattr("outgrow.streaming.sources.json_files._READ_BYTES", 7)
    for module in ("json_files", "reading"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.UNIT_BYTES", 500)
    yield


def write(folder: Path, data: str | bytes) -> Path:
    path = folder / "a.json"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# --- records ----------------------------------------------------------------------------------------------------------


def awkward(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value with what could mislead a search for brackets and quotes."""
    kind = draw.randrange(5 if depth < 3 else 3)
    if kind == 0:
        return draw.choice([None, True, False, 0, -1.5e10, 12345678901234567890])
    if kind < 3:
        return "".join(draw.choice(['"', "\\", "{", "]", ",", "\n", "я", "\U0001f600", "a"]) for _ in range(draw.randrange(9)))
    if kind == 3:
        return [awkward(draw, depth + 1) for _ in range(draw.randrange(4))]
    ends = ["", '"', "{", "[", "\\"]
    return {f"{key}{draw.choice(ends)}": awkward(draw, depth + 1) for key in range(draw.randrange(4))}


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("keys", [(), ("data",), ("a", "b")])
def test_records_are_what_a_whole_decoding_gives(folder: Path, indent: int | None, keys: tuple[str, ...]) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        records = [{"text": f"text {number}", "x": awkward(draw)} for number in range(draw.randrange(1, 30))]
        value: Any = records
        for key in reversed(keys):
            value = {f"before {key}": awkward(draw), key: value, "after": awkward(draw)}
        data = json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=indent)
        path = write(folder, ("\ufeff" if seed % 3 == 0 else "") + data)
        source = opened(folder.parent, folder, kind="json", records=".".join(keys))
        assert kept(source) == [
            Document(content=record["text"], source=f"a.json#{number}", meta={"x": record["x"]})
            for number, record in enumerate(records, 1)
        ]
        spans = list(record_spans(path, keys))
        raw = path.read_bytes()
        assert [json.loads(raw[span.start : span.start + span.num_bytes]) for span in spans] == records
        assert [span.line for span in spans] == [1 + raw.count(b"\n", 0, span.start) for span in spans]
        units = list(source.units())
        assert sum(unit.num_bytes for unit in units) == len(raw) == source.inputs[0].text_bytes
        assert len(units) >= len(raw) // 1500


@pytest.mark.usefixtures("small_reads")
def test_a_file_may_be_one_record_or_hold_none(folder: Path) -> None:
    write(folder, ' {"text": "a [1, {", "n": 1}\n')
    assert kept(opened(folder.parent, folder, kind="json")) == [Document(content="a [1, {", source="a.json", meta={"n": 1})]
    write(folder, " [ ] ")
    assert everything(opened(folder.parent, folder, kind="json")) == []
    write(folder, '{"x": {"data": []}}')
    assert everything(opened(folder.parent, folder, kind="json", records="x.data")) == []


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"text": "a",}', "not JSON"),
        ('{"text" "a"}', "not JSON"),
        ('{"text": tru}', "not JSON"),
        ('{"text": 1}', "text is a number"),
        ('{"txt": "a"}', "no key 'text'"),
        ('{"text": "\\q"}', "not JSON"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "a", "x": NaN}', "NaN is not JSON"),
        ('{"text": "a", "text": "b"}', "comes twice"),
        ('"a text"', "a JSON object is needed, not a text"),
        ("12", "a JSON object is needed, not a number"),
        ("nulll", "not JSON"),
        ('[{"text": "a"}]', "a JSON object is needed, not a list"),
        ('{"text": "a", "x": ' + "[" * 150 + "]" * 150 + "}", "nested too deeply"),
        ('{"text": "a", "x": [1}', "not JSON"),
    ],
)
def test_a_bad_record_costs_itself_alone(folder: Path, record: str, reason: str) -> None:
    balanced = record.count("[") == record.count("]")
    write(folder, f'[\n{{"text": "one"}},\n\n{record},\n{{"text": "three"}}]')
    if not balanced:  # its brackets do not tell where it ends: with it goes what comes after
        refused(folder.parent, folder, r"a\.json:\d: ", kind="json")
        source = opened(folder.parent, folder, kind="json", on_error="quarantine")
        assert texts(source) == ["one"]
        return
    refused(folder.parent, folder, rf"a\.json:4: .*{reason}", kind="json")
    found = everything(opened(folder.parent, folder, kind="json", on_error="quarantine"))
    assert [item.source for item in found] == ["a.json#1", "a.json#2", "a.json#3"]
    assert isinstance(found[1], Dropped) and found[1].content == record


def test_a_byte_that_is_not_utf8_costs_its_record(folder: Path) -> None:
    write(folder, b'[{"text": "a"}, {"text": "\xff\xfe"}, {"text": "c"}]')
    refused(folder.parent, folder, r"a\.json:1: byte 10 is not UTF-8", kind="json")
    source = opened(folder.parent, folder, kind="json", on_error="skip")
    assert texts(source) == ["a", "c"]
    assert dropped(source) == [("a.json#2", "malformed")]


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize(
    ("data", "records", "line", "reason"),
    [
        ("", "", 1, "the file is empty"),
        ("  \n ", "", 2, "the file is empty"),
        ("12", "", 1, "the file is a number or a word; a list of records, or one record is needed"),
        ('"abc"', "", 1, "the file is a text"),
        ('[{"text": "a"},\n{"text": "b"', "", 2, "record 2 begins here, and the file ends too early"),
        ('[{"text": "a"},\n{"text": "b', "", 2, "record 2 begins here, and the file ends within a text"),
        ('[{"text": "a"},\n{"text": "b\\', "", 2, "record 2 begins here, and the file ends within a text"),
        ('[{"text": "a"}\n', "", 2, "after record 1 neither ',' nor ']' follows"),
        ('[{"text": "a"}\n{"text": "b"}]', "", 2, "after record 1 neither ',' nor ']' follows"),
        ('[{"text": "a"},\n]', "", 2, "record 2 is missing"),
        ('[{"text": "a"},', "", 1, "the file ends where record 2 should begin"),
        ('[{"text": "a"}]\n[]', "", 2, "more follows after the end"),
        ('{"text": "a"}\n{"text": "b"}', "", 2, "read by kind: jsonl"),
        ('[{"text": "a"}]', "data", 1, "the file is a list; an object with the key 'data' is needed"),
        ('{"text": 1, "y": {"data": []}}', "data", 1, "no key 'data' in the file; its keys: text, y"),
        ('{"x": {"y": 1}}', "x.data", 1, "no key 'data' in 'x'; its keys: y"),
        ('{"x": 1}', "x.data", 1, "'x' is a number or a word; an object with the key 'data' is needed"),
        ('{"data": {"a": 1}}', "data", 1, "'data' is an object; a list of records is needed"),
        ('{"data": [{"text": "a"}]', "data", 1, "after the records, the file ends too early"),
        ('{"data": [{"text": "a"}]}]', "data", 1, "more follows"),
        ('{"x" 1, "data": []}', "data", 1, "after the key 'x' no ':' follows"),
        ('{x: 1, "data": []}', "data", 1, "neither a key nor the end of the file"),
        ('{"x": , "data": []}', "data", 1, "the value of 'x' is missing"),
        ("[" * 5000, "", 1, "record 1 begins here, and more than 1,000 levels are nested"),
        ('\ufeff[{"text": "a"}'.encode("utf-16"), "", 0, "UTF-16"),
    ],
)
def test_a_file_whose_records_cannot_be_told_apart(
    folder: Path, data: str | bytes, records: str, line: int, reason: str
) -> None:
    """What came before is used all the same, as ``on_error`` allows."""
    write(folder, data)
    where = f":{line}" if line else ""
    refused(folder.parent, folder, rf"a\.json{where}: .*({reason})", kind="json", records=records)
    source = opened(folder.parent, folder, kind="json", records=records, on_error="skip")
    found = everything(source)
    assert isinstance(found[-1], Dropped) and found[-1].reason in ("malformed", "undecodable")
    assert all(isinstance(item, Document) for item in found[:-1])
    assert found[-1].source == f"a.json{where}"  # not that of a record
    assert sum(unit.num_bytes for unit in source.units()) == source.inputs[0].text_bytes


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["string", "brackets"])
def test_a_record_that_is_too_long_is_left_out_in_bounded_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import tracemalloc

    for module in ("json_files", "json_records"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.MAX_DOCUMENT_BYTES", 5_000_000)
    with open(folder / "a.json", "wb") as file:
        file.write(b'[{"text": "a"},\n{"text": "')
        for _ in range(40 if kind == "string" else 6):
            file.write(b"x" * 1_000_000 if kind == "string" else b'", "": [], "":"' * 67_000)
        file.write(b'"},\n{"text": "c"}]')
    tracemalloc.start()
    source = opened(folder.parent, folder, kind="json", on_error="quarantine")
    found = everything(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.source for item in found] == ["a.json#1", "a.json#2", "a.json#3"]
    long = found[1]
    assert isinstance(long, Dropped)
    assert "bytes; at most 5,000,000 make one document" in long.detail
    assert len(long.content) == 64 * 1024
    assert peak < 12_000_000


def test_many_records_take_little_memory(folder: Path) -> None:
    """The list is never in memory whole, nor is a unit much longer than it should be."""
    import tracemalloc

    record = json.dumps({"text": "слово " * 300}, ensure_ascii=False)
    with open(folder / "a.json", "w", encoding="utf-8") as file:
        file.write("[" + record)
        for _ in range(2500):
            file.write(",\n" + record)
        file.write("]")
    source = opened(folder.parent, folder, kind="json")
    tracemalloc.start()
    count = sum(1 for unit in source.units() for _ in unit.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2501
    assert (folder / "a.json").stat().st_size > 8_000_000
    assert peak < 5_000_000
    assert max(unit.num_bytes for unit in source.units()) < 1_100_000
