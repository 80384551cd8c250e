"""The engine under all kinds of files: units, and what becomes of what does not fit."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from opened_sources import everything, opened

from outgrow.errors import DataError
from outgrow.recipes.schema.sources import FileSource, JsonlSource, JsonSource, OnError, ParquetSource, Source, TextSource
from outgrow.streaming.sources import BadRecordError, Document, Dropped, Unit, file_reader
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import Dialogue
from outgrow.streaming.sources.documents import size_of
from outgrow.streaming.sources.reading import QUARANTINE_BYTES, Files, FilesUnit, open_whole_files


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A reader for tests: a line is a document, or tells what to do instead."""

    def read(self, path: Path, name: str) -> Iterator[Document | BadRecordError]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match line.split(" ", 1):
                case ["yield", message]:
                    yield BadRecordError(message, line=number, content=line)
                case ["named", message]:
                    yield BadRecordError(message, source=f"{name}#n{number}", content="я" * QUARANTINE_BYTES)
                case ["raise", message]:
                    raise BadRecordError(message, reason="undecodable")
                case ["empty", message]:
                    raise BadRecordError(message, reason="empty")
                case ["deep", _]:
                    raise RecursionError
                case ["gone", _]:
                    (path.parent / "nowhere").read_bytes()
                case _:
                    yield Document(content=line, source=f"{name}#{number}")


def files(folder: Path, on_error: OnError, **texts: str) -> Files:
    folder = folder / "files"
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    source = TextSource(kind="text", path="x", include=("*",), on_error=on_error)
    return open_whole_files("s", source, str(folder), DigestCache(folder.parent / "cache"), Lines(), max_bytes=1000)


# --- on_error ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nyield it is odd\nb", r"/x:2: it is odd\n  correct it, exclude the file, or set on_error: skip or quarantine"),
        ("named it is odd", r"/x: it is odd"),
        ("raise no text", r"/x: no text\n  set the source's encoding where it has one, exclude the file, or set on_error"),
        ("deep \n", "/x: it is nested too deeply"),
        ("x" * 1001, r"/x: 1,001 bytes are too long for one document; at most 1,000: divide it"),
    ],
)
def test_what_does_not_fit_stops_the_build_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        everything(files(tmp_path, "stop", x=text))


def test_what_does_not_fit_is_left_out_and_the_rest_read(tmp_path: Path) -> None:
    texts = {"a": "one\nyield odd\nnamed odder\nthree", "b": "four\nraise broken\nfive", "c": "deep \nsix", "d": "seven"}
    for on_error in ("skip", "quarantine"):
        found = everything(files(tmp_path, on_error, **texts))  # type: ignore[arg-type]
        assert [item.content for item in found if isinstance(item, Document)] == ["one", "three", "four", "seven"]
        dropped = [item for item in found if isinstance(item, Dropped)]
        assert [(item.source, item.reason, item.detail) for item in dropped] == [
            ("a#2", "malformed", "odd"),
            ("a#n3", "malformed", "odder"),
            ("b", "undecodable", "broken"),
            ("c", "malformed", "it is nested too deeply"),
        ]
        contents = [item.content for item in dropped]
        expected = ["yield odd", "я" * (QUARANTINE_BYTES // 2), texts["b"], texts["c"]]
        assert contents == (expected if on_error == "quarantine" else [""] * 4)


def test_what_is_empty_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    found = everything(files(tmp_path, "stop", a="one\nempty nothing here\ntwo", b="", c="\n \n"))
    assert found[0] == Document(content="one", source="a#1")
    assert found[1:] == [
        Dropped(source="a", reason="empty", detail="nothing here"),
        Dropped(source="c#1", reason="empty", detail="it has no text"),
        Dropped(source="c#2", reason="empty", detail="it has no text"),
    ]


def test_what_the_machine_refuses_always_stops(tmp_path: Path) -> None:
    for on_error in get_args(OnError):
        with pytest.raises(DataError, match="x: the file cannot be read: No such file"):
            everything(files(tmp_path, on_error, x="gone "))


def test_quarantine_keeps_no_half_characters_and_nothing_of_binary_files(tmp_path: Path) -> None:
    limit = "x" * (QUARANTINE_BYTES - 1) + "яя"
    source = files(tmp_path, "quarantine", a="raise broken")
    (tmp_path / "files" / "a").write_text("raise broken\n" + limit)
    (long,) = everything(source)
    assert isinstance(long, Dropped) and len(long.content.encode()) <= QUARANTINE_BYTES
    assert long.content.startswith("raise broken\nxxx")
    (tmp_path / "files" / "a").write_bytes(b"raise broken\n\0")
    (binary,) = everything(source)
    assert isinstance(binary, Dropped) and binary.content == ""


def test_a_text_longer_than_a_document_may_be_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.streaming.sources.reading.MAX_DOCUMENT_BYTES", 5)
    first, second = everything(files(tmp_path, "skip", a="123456\n12345"))
    assert isinstance(first, Dropped) and "6 characters are too long for one document; at most 5" in first.detail
    assert isinstance(second, Document)


# --- units ------------------------------------------------------------------------------------------------------------


def test_small_files_share_a_unit_and_none_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.streaming.sources.reading.UNIT_BYTES", 100)
    source = files(tmp_path, "stop", **{f"{number:03}": "x" * (number % 37 + 1) for number in range(200)})
    units = list(source.units())
    assert [document.source for unit in units for document in unit.documents()] == [f"{number:03}#1" for number in range(200)]
    assert all(100 <= unit.num_bytes < 140 for unit in units[:-1])
    assert sum(unit.num_bytes for unit in units) == sum(item.text_bytes for item in source.inputs)


def read(unit: Unit) -> list[Document | Dropped]:
    return list(unit.documents())


def test_units_are_plain_data_that_another_process_reads_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "reading", "json_files", "parquet"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.UNIT_BYTES", 1000)
    records = [{"text": f"record {number} " + "слово " * 20, "n": number} for number in range(50)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n{\n")
    (folder / "a.json").write_text(json.dumps([*records, 5]))
    pq.write_table(pa.Table.from_pylist([*records, {"text": None}]), folder / "a.parquet", row_group_size=9)
    (folder / "a.txt").write_text("text")
    (folder / "b.txt").write_bytes(b"\xff\xfe1")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for kind in ("jsonl", "json", "parquet", "text"):
            units = list(opened(tmp_path, folder, kind=kind, on_error="quarantine").units())
            assert len(units) > 3 or kind == "text"
            here = [read(unit) for unit in units]
            assert [read(pickle.loads(pickle.dumps(unit))) for unit in reversed(units)] == here[::-1]
            assert list(pool.map(read, units)) == here
            assert isinstance(here[-1][-1], Dropped)


def test_units_do_not_carry_the_text_of_plain_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join('{"text": "' + "x" * 1000 + '"}' for _ in range(1500)))
    units = list(opened(tmp_path, tmp_path / "a.jsonl", kind="jsonl").units())
    assert len(units) == 2 and all(isinstance(unit, FilesUnit) and len(pickle.dumps(unit)) < 2000 for unit in units)


def test_the_size_of_documents_in_memory() -> None:
    turns: Any = ({"role": "user", "content": "abc"}, {"role": "assistant", "content": "d", "reasoning_content": "ef"})
    assert size_of(Document(content=Dialogue(messages=turns), source="s")) == 6
    assert size_of(Dropped(source="s", reason="empty")) == 0


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "text"])
def test_units_add_up_to_the_size_of_the_inputs_whatever_is_wrong_with_them(tmp_path: Path, kind: str) -> None:
    """The parts of a store end where inputs do."""
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"] * 9}), folder / "a.x")
    pq.write_table(pa.table({"other": ["a"] * 9}), folder / "b.x")
    (folder / "c.x").write_bytes((folder / "a.x").read_bytes()[:-30])
    (folder / "d.x").write_text('{"text": "a"}\n{"text": 5}\n{')
    (folder / "e.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{\n'))
    (folder / "f.gz").write_bytes((folder / "e.gz").read_bytes()[:-5])
    (folder / "g.x").write_text('[{"text": "a"}, {"text": 5}, {"text": "b"}')
    (folder / "h.x").write_text("")
    for name in [None, *"abcdefgh"]:
        include = ["*"] if name is None else [f"{name}.*"]
        source = opened(tmp_path, folder, kind=kind, include=include, on_error="skip")
        assert sum(unit.num_bytes for unit in source.units()) == sum(item.text_bytes for item in source.inputs), name
        assert everything(source) == everything(source)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_the_recipe_has_a_reader() -> None:
    divided = (JsonlSource, JsonSource, ParquetSource)
    kinds = [kind for kind in get_args(get_args(Source)[0]) if issubclass(kind, FileSource) and kind not in divided]
    assert len(kinds) >= 8
    for kind in kinds:
        name = get_args(kind.model_fields["kind"].annotation)[0]
        reader = file_reader(kind(kind=name, path="x"))
        assert pickle.loads(pickle.dumps(reader)) == reader
        assert callable(reader.read)
