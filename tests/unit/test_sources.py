"""Sources: what is found, decoded, refused and skipped, and that work units lose and double nothing."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from text_recipes import make_recipe, make_site
from token_stores import documents as token_documents

from outgrow.errors import DataError
from outgrow.streaming.sources import Document, Skipped, Source, open_source
from outgrow.streaming.sources import document as document_module
from outgrow.streaming.sources.digests import DigestCache, Stamp
from outgrow.streaming.sources.lines import line_blocks, text_bytes

RUSSIAN = (
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Москва - столица России; "
    "население города составляет более двенадцати миллионов человек.\n"
)


def opened(root: Path, folder: Path, **source: Any) -> Source:
    recipe = make_recipe({"name": "s", "source": {"path": "folder", **source}})
    return open_source(recipe.data.streams[0], make_site(root, folder=folder), DigestCache(root / "cache"))


def everything(source: Source) -> list[Document | Skipped]:
    return [document for unit in source.units() for document in unit.documents()]


def texts(source: Source) -> list[str]:
    return [document.text or "" for document in everything(source) if isinstance(document, Document)]


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1251", "koi8-r", "cp866", "iso8859-5"])
def test_russian_text_is_decoded_whatever_its_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ru.txt").write_bytes((RUSSIAN * 10).encode(encoding))
    assert texts(opened(tmp_path, tmp_path / "a", kind="text")) == [RUSSIAN * 10]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Привет".encode("koi8-r"), "in doubt"),
        ("Le café était déjà fermé, quel dommage. ".encode("cp1252") * 5, "in doubt"),
        (RUSSIAN.encode("utf-16-le"), "zero bytes"),
        (b"\xff\xfea", "utf-16"),
        (bytes(range(128, 256)) * 20, "in doubt|no encoding"),
    ],
)
def test_text_in_doubt_is_refused_by_name(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "odd.txt").write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        everything(opened(tmp_path, tmp_path / "a", kind="text"))
    assert "odd.txt" in str(caught.value)
    assert everything(opened(tmp_path, tmp_path / "a", kind="text", on_error="skip")) == [
        Skipped(source="odd.txt", reason="undecodable")
    ]


def test_a_given_encoding_is_used_and_an_unknown_one_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "fr.txt").write_bytes("déjà".encode("cp1252"))
    (only,) = everything(opened(tmp_path, tmp_path / "a", kind="text", encoding="cp1252"))
    assert only == Document(text="déjà", source="fr.txt", meta={"encoding": "cp1252"})
    for wrong in ("cp99999", "hex"):
        with pytest.raises(DataError, match=wrong):
            opened(tmp_path, tmp_path / "a", kind="text", encoding=wrong)


def test_globs_links_and_order(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.txt", "a.md", "deep/er/c.txt", "deep/skip.txt", "x.bin", "[1].txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.txt").write_text("linked")
    (root / "link").symlink_to(tmp_path / "other")
    (root / "deep" / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    source = opened(tmp_path, root, kind="text", include=["**/*.txt", "*.md"], exclude=["**/skip.*"])
    assert [item.name for item in source.inputs] == ["[1].txt", "a.md", "b.txt", "deep/er/c.txt", "link/linked.txt"]
    assert texts(opened(tmp_path, root, kind="text", include=["[[]1].t?t"])) == ["[1].txt"]
    assert texts(opened(tmp_path, root / "b.txt", kind="text")) == ["b.txt"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_link_that_leads_nowhere_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.jsonl").write_text('{"text": "a"}')
    (root / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (root / "loop.jsonl").symlink_to(root / "loop.jsonl")
    (root / "gone.other").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl: .*leads to no file"):
        opened(tmp_path, root, kind=kind, include=["*.jsonl"])
    source = opened(tmp_path, root, kind=kind, include=["*.jsonl"], on_error="skip")
    skipped = [document for document in everything(source) if isinstance(document, Skipped)]
    assert skipped == [Skipped(source=name, reason="missing") for name in ("gone.jsonl", "loop.jsonl")]
    assert [item.name for item in source.inputs] == ["a.jsonl"]
    opened(tmp_path, root, kind=kind, include=["*.jsonl"], exclude=["gone.*", "loop.*"])


def test_missing_and_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file or folder .*nowhere"):
        opened(tmp_path, tmp_path / "nowhere", kind="text")
    with pytest.raises(DataError, match=r"no file in .*empty matches \*\*/\*.jsonl"):
        opened(tmp_path, tmp_path / "empty", kind="jsonl")
    (tmp_path / "empty" / "nothing.txt").touch()
    assert everything(opened(tmp_path, tmp_path / "empty", kind="text")) == [Skipped(source="nothing.txt", reason="empty")]


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.txt"
    file.parent.mkdir()
    file.write_text("one")
    source = opened(tmp_path, file.parent, kind="text")
    source.check_unchanged()
    file.write_text("two")
    with pytest.raises(DataError, match="changed while"):
        source.check_unchanged()


# --- jsonl ------------------------------------------------------------------------------------------------------------


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    if name.endswith(".zst"):
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        return compress(data[:1000]) + compress(b"") + compress(data[1000:])
    return data


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many units from little text."""
    for module in ("lines", "text", "documents"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.UNIT_BYTES", 500)
    monkeypatch.setattr("outgrow.streaming.sources.lines._READ_BYTES", 64)
    yield


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_come_once_each_in_order_with_their_numbers(tmp_path: Path, name: str, end: str) -> None:
    values = [{"text": f"line {i} " + "x" * (i * 7 % 90), "id": i} for i in range(200)]
    values[50]["text"] = "long " * 700
    data = "\n".join(json.dumps(value) for value in values) + end
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(compressed(name, data.encode()))
    source = opened(tmp_path, tmp_path / "a", kind="jsonl")
    assert everything(source) == [
        Document(text=str(value["text"]), source=f"{name}#{i}", meta={"id": value["id"]}) for i, value in enumerate(values, 1)
    ]
    units = list(source.units())
    assert len(units) > 5
    assert sum(unit.num_bytes for unit in units) == len(data) == source.inputs[0].text_bytes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[1]", "a JSON object is needed, not list"),
        (b'{"txt": "a", "id": 3}', "no key 'text'; its keys: txt, id"),
        (b'{"text": 3}', "is int, not a string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "byte 10 is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "m": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "\\ud83d\\ude00"}\n')
    with pytest.raises(DataError, match=reason) as caught:
        everything(opened(tmp_path, tmp_path / "a", kind="jsonl"))
    assert "b.jsonl:3: " in str(caught.value)
    skipping = everything(opened(tmp_path, tmp_path / "a", kind="jsonl", on_error="skip"))
    assert skipping[1:3] == [Skipped(source="b.jsonl#2", reason="empty"), Skipped(source="b.jsonl#3", reason="malformed")]
    assert skipping[3] == Document(text="\U0001f600", source="b.jsonl#4")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    data = bytearray(compressed(name, os.urandom(300_000).hex().encode()))
    if damage == "cut":
        del data[-2000:]
    else:
        data[2100] ^= 255
        data[2101] ^= 255
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: the compressed file is damaged"):
        text_bytes(tmp_path / name)


def test_a_zstd_window_above_the_limit_is_told_from_damage(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    choices = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=choices).compressobj()
    file.write_bytes(compressor.compress(b'{"text": "a"}') + compressor.flush())
    with pytest.raises(DataError, match="window of more than 128 MiB.*\n.*--long"):
        text_bytes(file)


def test_a_zstd_bomb_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    bomb = tmp_path / "bomb.jsonl.zst"
    bomb.write_bytes(zstandard.ZstdCompressor().compress(bytes(400_000_000)))
    assert bomb.stat().st_size < 100_000
    monkeypatch.setattr("outgrow.streaming.sources.lines.MAX_DOCUMENT_BYTES", 10_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="bomb.jsonl.zst:1: the line is longer than 10,000,000"):
        list(line_blocks(bomb))
    assert tracemalloc.get_traced_memory()[1] < 120_000_000
    tracemalloc.stop()


# --- mds and custom ---------------------------------------------------------------------------------------------------


def write_mds(folder: Path, encoding: str, samples: list[Any], column: str = "tokens") -> None:
    from outgrow.streaming import _mosaic

    with _mosaic.MDSWriter(columns={column: encoding}, out=str(folder), hashes=["sha1"], size_limit=2000) as writer:
        for sample in samples:
            writer.write({column: sample})


@pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray:int32", "ndarray", "bytes"])
def test_what_mdswriter_wrote_opens_here(tmp_path: Path, encoding: str) -> None:
    """llm-foundry writes ``ndarray`` tokens, and before 0.5 the bytes of int64."""
    tokens = [np.asarray(item[0], np.int64) for item in token_documents(3, 40)]
    dtype = {"ndarray:uint16": np.uint16, "ndarray:int32": np.int32}.get(encoding, np.int64)
    write_mds(tmp_path / "mds", encoding, [t.tobytes() if encoding == "bytes" else t.astype(dtype) for t in tokens])
    found = everything(opened(tmp_path, tmp_path / "mds", kind="mds"))
    assert len(found) == 40
    for number, (document, expected) in enumerate(zip(found, tokens, strict=True)):
        assert isinstance(document, Document) and document.token_ids is not None
        assert document.source == f"mds#{number}"
        np.testing.assert_array_equal(document.token_ids, expected)


def test_an_mds_folder_without_such_a_column_or_with_a_hostile_index_is_refused(tmp_path: Path) -> None:
    write_mds(tmp_path / "mds", "str", ["a", "b"], column="text")
    with pytest.raises(DataError, match=r"no column 'tokens' of token ids; columns: text \(str\)"):
        opened(tmp_path, tmp_path / "mds", kind="mds")
    index = tmp_path / "mds" / "index.json"
    value = json.loads(index.read_text())
    for change in ({"column_encodings": ["pkl"]}, {"raw_data": {**value["shards"][0]["raw_data"], "basename": "../x.mds"}}):
        index.write_text(json.dumps({**value, "shards": [{**value["shards"][0], **change}]}))
        with pytest.raises(DataError):
            opened(tmp_path, tmp_path / "mds", kind="mds")


calls = 0


def numbered(count: int, *, steady: bool = True) -> Iterator[Document]:
    """A custom source; unless ``steady``, other documents at each call."""
    global calls
    calls += 1
    for number in range(count):
        yield Document(text=f"document {number} {0 if steady else calls}", source=f"numbered#{number}", meta={"n": number})


def wrong() -> list[str]:
    return ["a plain string"]


def failing() -> Iterator[Document]:
    yield Document(text="one", source="failing#0")
    raise RuntimeError("midway")


def opened_custom(root: Path, name: str, **options: Any) -> Source:
    recipe = make_recipe({"name": "s", "source": {"kind": "custom", "factory": f"{__name__}:{name}", "options": options}})
    return open_source(recipe.data.streams[0], make_site(root), DigestCache(root / "cache"))


def test_a_custom_source_is_named_by_what_it_yields(tmp_path: Path) -> None:
    source = opened_custom(tmp_path, "numbered", count=5)
    assert texts(source) == [f"document {number} 0" for number in range(5)]
    source.check_unchanged()
    assert source.inputs == opened_custom(tmp_path, "numbered", count=5).inputs
    assert source.inputs[0].digest != opened_custom(tmp_path, "numbered", count=6).inputs[0].digest

    restless = opened_custom(tmp_path, "numbered", count=5, steady=False)
    everything(restless)
    with pytest.raises(DataError, match="other documents"):
        restless.check_unchanged()


@pytest.mark.parametrize(("name", "options", "reason"), [
    ("wrong", {}, "yielded str"), ("absent", {}, "cannot be imported"), ("numbered", {"count": 0}, "no document"),
    ("numbered", {"cuont": 1}, "numbered: TypeError: .*cuont"), ("failing", {}, "failing: RuntimeError: midway"),
])  # fmt: skip
def test_a_custom_source_that_is_wrong_is_refused(tmp_path: Path, name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        opened_custom(tmp_path, name, **options)


def test_a_custom_source_whose_module_is_no_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_python_at_all.py").write_text("def documents(:")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = make_recipe({"name": "s", "source": {"kind": "custom", "factory": "no_python_at_all:documents"}})
    with pytest.raises(DataError, match="no_python_at_all:documents: it cannot be imported: SyntaxError"):
        open_source(recipe.data.streams[0], make_site(tmp_path), DigestCache(tmp_path / "cache"))


# --- the stat cache ---------------------------------------------------------------------------------------------------


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(str(number))
    now = time.time_ns()
    monkeypatch.setattr("outgrow.streaming.sources.digests.time.time_ns", lambda: now + 10_000_000_000)
    first = opened(tmp_path, folder, kind="text").inputs
    read: list[Path] = []
    monkeypatch.setattr(
        "outgrow.streaming.sources.digests.file_digest", lambda path: read.append(path) or document_module.__name__
    )
    assert opened(tmp_path, folder, kind="text").inputs == first
    assert not read
    (folder / "1.txt").write_text("!")
    opened(tmp_path, folder, kind="text").inputs  # noqa: B018  (a property that reads)
    assert [path.name for path in read] == ["1.txt"]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """Two writes within the clock's tick leave the same times."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    opened(tmp_path, tmp_path / "a", kind="text").inputs  # noqa: B018
    with sqlite3.connect(tmp_path / "cache" / "inputs.sqlite") as database:
        assert database.execute("select count(*) from inputs").fetchone() == (0,)
    database.close()


def test_no_lock_is_held_while_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.streaming.sources.digests._AT_REST_NS", -(10**12))
    monkeypatch.setattr("outgrow.streaming.sources.digests._SAVE_EVERY_S", 0.0)
    files = [tmp_path / str(number) for number in range(3)]
    for file in files:
        file.write_text("x")
    cache = DigestCache(tmp_path / "cache")
    remembered: list[int] = []

    def look(path: Path) -> int:
        with closing(sqlite3.connect(tmp_path / "cache" / "inputs.sqlite", timeout=0, isolation_level=None)) as database:
            database.execute("begin exclusive")
            remembered.extend(database.execute("select count(*) from inputs").fetchone())
        return 1

    cache.measure([(file, Stamp.of(file)) for file in files], look)
    assert remembered == [0, 1, 2]


def test_a_damaged_digest_cache_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "inputs.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="inputs.sqlite: .*not a database"):
        opened(tmp_path, tmp_path / "a", kind="text").inputs  # noqa: B018
