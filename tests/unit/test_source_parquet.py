"""Parquet files, of Arrow and of other programs: rows come once each, values become plain, what does not fit is named."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from opened_sources import dropped, everything, kept, opened, refused, texts

from outgrow.errors import DataError
from outgrow.streaming.sources import Dialogue, Document, Dropped, PreferencePair

FILES = Path(__file__).parents[1] / "files"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("outgrow.streaming.sources.parquet.UNIT_BYTES", 2000)
    monkeypatch.setattr("outgrow.streaming.sources.reading.UNIT_BYTES", 2000)
    monkeypatch.setattr("outgrow.streaming.sources.parquet._PIECE_BYTES", 3000)
    monkeypatch.setattr("outgrow.streaming.sources.parquet._BATCH_BYTES", 700)
    yield


def write(folder: Path, columns: dict[str, Any], **choices: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet", **choices)
    return folder / "a.parquet"


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("rows_a_group", [1, 7, 64, 1000])
@pytest.mark.parametrize("dictionary", [True, False])
def test_rows_come_once_each_in_order_with_their_numbers(folder: Path, rows_a_group: int, dictionary: bool) -> None:
    draw = random.Random(rows_a_group)
    values = [
        f"{number} " + "".join(chr(draw.randrange(1072, 1104)) for _ in range(draw.randrange(200))) for number in range(200)
    ]
    write(folder, {"text": values, "id": list(range(200))}, row_group_size=rows_a_group, use_dictionary=dictionary)
    source = opened(folder.parent, folder, kind="parquet")
    units = list(source.units())
    assert kept(source) == [
        Document(content=value, source=f"a.parquet#{number}", meta={"id": number - 1}) for number, value in enumerate(values, 1)
    ]
    assert len(units) > 5
    assert sum(unit.num_bytes for unit in units) == source.inputs[0].text_bytes
    # a unit by itself, in any order, as another process reads it
    number = {document.source: index for index, document in enumerate(everything(source))}
    for unit in reversed(units):
        found = [number[document.source] for document in unit.documents()]
        assert found == list(range(found[0], found[0] + len(found)))


def test_an_empty_file_holds_no_document(folder: Path) -> None:
    write(folder, {"text": pa.array([], pa.string())})
    assert everything(opened(folder.parent, folder, kind="parquet")) == []


def test_columns_become_plain_json_values(folder: Path) -> None:
    day, at = datetime.date(2024, 2, 3), datetime.datetime(2024, 2, 3, 4, 5, 6, 7)
    columns = {
        "text": ["a"],
        "null": pa.nulls(1),
        "nan": [float("nan")],
        "inf": pa.array([float("inf")], pa.float32()),
        "half": pa.array([0.5], pa.float32()),
        "day": [day],
        "at": [at],
        "ns": pa.array([1_700_000_000_000_000_123], pa.timestamp("ns", "UTC")),
        "time": pa.array([3_723_000_000_001], pa.time64("ns")),
        "duration": pa.array([1_500_000_001], pa.duration("ns")),
        "decimal": [Decimal("1.50")],
        "raw": [b"\xff"],
        "view": pa.array([b"\xff"], pa.binary_view()),
        "picture": [{"bytes": b"\xff", "path": "p"}],
        "only": [{"bytes": b"\xff"}],
        "deep": [[{"x": [1.0, float("nan")], "y": {"z": day}, "raw": b"x"}]],
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "number": [2**63 - 1],
        "word": pa.array(["w"]).dictionary_encode(),
        "flag": [True],
    }
    write(folder, columns)
    (only,) = kept(opened(folder.parent, folder, kind="parquet"))
    assert only.meta == {
        "null": None,
        "nan": None,
        "inf": None,
        "half": 0.5,
        "day": "2024-02-03",
        "at": "2024-02-03T04:05:06.000007",
        "ns": "2023-11-14T22:13:20+00:00",
        "time": "01:02:03",
        "duration": "0:00:01.500000",
        "decimal": "1.50",
        "picture": {"path": "p"},
        "deep": [{"x": [1.0, None], "y": {"z": "2024-02-03"}, "raw": None}],
        "map": {"k": 1},
        "number": 2**63 - 1,
        "word": "w",
        "flag": True,
    }


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()])
def test_text_in_columns_of_every_kind(folder: Path, kind: Any) -> None:
    write(folder, {"text": pa.array(["я", "b", None, ""], kind), "n": [1, 2, 3, 4]})
    source = opened(folder.parent, folder, kind="parquet")
    assert texts(source) == ["я", "b"]
    assert dropped(source) == [("a.parquet#3", "empty"), ("a.parquet#4", "empty")]


# --- other programs ---------------------------------------------------------------------------------------------------


def test_dialogues_that_duckdb_wrote(tmp_path: Path) -> None:
    found = kept(opened(tmp_path, FILES / "dialogues.parquet", kind="parquet", shape={"kind": "messages"}))
    assert len(found) == 6
    assert found[2] == Document(
        content=Dialogue(
            messages=(
                {"role": "user", "content": "Вопрос 2"},
                {"role": "assistant", "content": "Ответ 2", "name": "bot"},
            )
        ),
        source="dialogues.parquet#3",
        meta={"id": 2, "topic": "тема 0", "counts": {"a": 2, "b": 4}, "at": "2024-05-08T07:08:09", "price": "0.50"},
    )
    assert found[3].meta["topic"] is None


def test_texts_that_polars_wrote(tmp_path: Path) -> None:
    source = opened(tmp_path, FILES / "texts.parquet", kind="parquet")
    assert texts(source) == ["Первый текст", "second text", "пятый"]
    assert dropped(source) == [("texts.parquet#3", "empty"), ("texts.parquet#4", "empty")]
    second = everything(source)[1]
    assert isinstance(second, Document)
    assert second.meta == {
        "score": None,
        "at": "2024-01-02T03:04:05.123456",
        "day": "2024-01-02",
        "tags": [],
        "where": {"file": "f1", "line": 1},
        "kind": "y",
    }


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_missing_column_is_named_when_the_source_is_opened(folder: Path) -> None:
    write(folder, {"body": ["a"], "id": [1]})
    with pytest.raises(
        DataError, match=r"a\.parquet: there is no column 'text', which shape: \{kind: text\} needs; columns: body, id"
    ):
        opened(folder.parent, folder, kind="parquet")
    with pytest.raises(DataError, match=r"there is no column 'chosen', which shape: \{kind: preference\}"):
        opened(folder.parent, folder, kind="parquet", shape={"kind": "preference"})
    assert texts(opened(folder.parent, folder, kind="parquet", shape={"kind": "text", "field": "body"})) == ["a"]
    assert dropped(opened(folder.parent, folder, kind="parquet", on_error="skip")) == [("a.parquet", "malformed")]


def test_two_columns_of_one_name_are_refused(folder: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, folder / "a.parquet")
    refused(folder.parent, folder, "two columns are called 'text'", kind="parquet")


def test_a_row_that_does_not_fit_is_named(folder: Path) -> None:
    good = [{"role": "user", "content": "u"}]
    write(folder, {"messages": [good, [{"role": "usr", "content": "u"}], good], "n": [1, 2, 3]})
    shape = {"kind": "messages"}
    refused(folder.parent, folder, r"a\.parquet: row 2: messages\[0\]\.role is 'usr'", kind="parquet", shape=shape)
    found = everything(opened(folder.parent, folder, kind="parquet", shape=shape, on_error="quarantine"))
    assert [item.source for item in found] == [f"a.parquet#{number}" for number in (1, 2, 3)]
    assert isinstance(found[1], Dropped)
    assert found[1].content == '{"messages": [{"role": "usr", "content": "u"}], "n": 2}'


def test_bytes_that_are_not_utf8_cost_their_row(folder: Path) -> None:
    raw = pa.array([b"a", b"\xff", b"c"])
    for column in (raw, pa.Array.from_buffers(pa.string(), 3, raw.buffers())):
        write(folder, {"text": column})
        refused(folder.parent, folder, r"a\.parquet: row 2: .*(not UTF-8|can't decode)", kind="parquet")
        source = opened(folder.parent, folder, kind="parquet", on_error="skip")
        assert texts(source) == ["a", "c"]
        assert dropped(source) == [("a.parquet#2", "malformed")]


def test_a_time_beyond_the_calendar_costs_its_row(folder: Path) -> None:
    write(folder, {"text": ["a", "b"], "at": pa.array([0, 2**62], pa.timestamp("us"))})
    refused(folder.parent, folder, r"a\.parquet: row 2: it cannot be read", kind="parquet")
    assert texts(opened(folder.parent, folder, kind="parquet", on_error="skip")) == ["a"]


def test_preference_pairs_in_rows(folder: Path) -> None:
    write(folder, {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"], "n": [1]})
    (only,) = kept(opened(folder.parent, folder, kind="parquet", shape={"kind": "preference"}))
    assert isinstance(only.content, PreferencePair) and only.meta == {"n": 1}


@pytest.mark.parametrize("damage", ["none", "text", "empty", "cut", "footer", "page"])
def test_a_file_that_is_no_sound_parquet_is_named(folder: Path, damage: str) -> None:
    path = write(
        folder, {"text": ["a long text " * 50] * 50, "n": list(range(50))}, write_page_checksum=True, compression="none"
    )
    data = bytearray(path.read_bytes())
    match damage:
        case "text":
            data = bytearray(b'{"text": "a"}\n')
        case "empty":
            data = bytearray()
        case "cut":
            del data[len(data) // 2 :]
        case "footer":
            data[-60:-20] = bytes(40)
        case "page":
            data[100] ^= 1
    path.write_bytes(data)
    write_other = pa.table({"text": ["fine"]})
    pq.write_table(write_other, folder / "b.parquet")
    if damage == "none":
        assert len(kept(opened(folder.parent, folder, kind="parquet"))) == 51
        return
    refused(folder.parent, folder, r"a\.parquet: it is no Parquet that can be read", kind="parquet")
    source = opened(folder.parent, folder, kind="parquet", on_error="skip")
    assert texts(source) == ["fine"]
    assert dropped(source) == [("a.parquet", "malformed")]
    assert len(source.inputs) == 2


def test_a_column_that_repeats_a_long_value_takes_bounded_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary lets a file of kilobytes stand for gigabytes."""
    monkeypatch.setattr("outgrow.streaming.sources.parquet._EXPANDED_BYTES", 8_000_000)
    value = "x" * 1_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 120, pa.int32()), pa.array([value]))
    path = write(folder, {"text": column.cast(pa.string())}, compression="zstd", dictionary_pagesize_limit=4_000_000)
    assert path.stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    count = peak = 0
    for unit in opened(folder.parent, folder, kind="parquet").units():
        for document in unit.documents():
            assert isinstance(document, Document) and len(str(document.content)) == 1_000_000
            count, peak = count + 1, max(peak, pool.bytes_allocated() - before)
    assert count == 120
    assert peak < 40_000_000
