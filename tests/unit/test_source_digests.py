"""sha256 of input files: remembered while a file is unchanged, and no longer."""

from __future__ import annotations

import gzip
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from opened_sources import opened

from outgrow.errors import DataError
from outgrow.streaming.sources import document as document_module
from outgrow.streaming.sources.digests import DigestCache, Stamp


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
        assert database.execute("select count(*) from measured").fetchone() == (0,)
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
            remembered.extend(database.execute("select count(*) from measured").fetchone())
        return 1

    cache.measure([(file, Stamp.of(file)) for file in files], look, "text")
    assert remembered == [0, 1, 2]


def test_a_damaged_digest_cache_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "inputs.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="inputs.sqlite: .*not a database"):
        opened(tmp_path, tmp_path / "a", kind="text").inputs  # noqa: B018


def test_the_size_of_the_text_depends_on_what_a_file_is_read_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.streaming.sources.digests._AT_REST_NS", -(10**12))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 50, mtime=0))
    stored = (tmp_path / "a.jsonl.gz").stat().st_size
    for _ in range(2):  # measured, then remembered
        for kind, expected in (("text", stored), ("jsonl", 700)):
            (only,) = opened(tmp_path, tmp_path / "a.jsonl.gz", kind=kind).inputs
            assert (only.num_bytes, only.text_bytes) == (stored, expected)
