"""The storage view: what is written is whole or absent, and no key leads out of the root."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from full_disk import files_limited_to

from outgrow.errors import IntegrityError, UserError
from outgrow.storage import (
    Storage,
    digest,
    file_digest,
    fingerprint,
    nearest_folder,
    sync_tree,
    tree_digests,
    verify_tree,
)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(str(tmp_path / "root"))
    else:
        root = f"memory://{uuid4()}"
        yield Storage(root)
        Storage("memory://").remove(root.removeprefix("memory://"))


def test_what_is_written_is_read_back_whole_and_in_part(storage: Storage) -> None:
    storage.write("a/b.bin", bytes(range(100)))
    assert storage.read("a/b.bin") == bytes(range(100))
    assert storage.read_range("a/b.bin", 10, 20) == bytes(range(10, 20))
    assert storage.read_range("a/b.bin", 90, 200) == bytes(range(90, 100))
    assert storage.sizes("a")["b.bin"] == 100
    storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new"


def test_json_goes_through_unchanged(storage: Storage) -> None:
    value = {"ä": [1, 2.5, None], "b": {"c": "d"}}
    storage.write_json("x.json", value)
    assert storage.read_json("x.json") == value


def test_names_and_sizes_list_one_level(storage: Storage) -> None:
    storage.write("d/b", b"12")
    storage.write("d/a", b"1")
    storage.write("d/sub/c", b"123")
    assert storage.names("d") == ["a", "b", "sub"]
    assert storage.names("") == ["d"]
    assert storage.sizes("d") == {"a": 1, "b": 2}
    assert storage.names("absent") == []
    assert storage.sizes("absent") == {}


def test_a_folder_is_listed_while_files_come_and_go(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("d/stays", b"1")
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for number in range(20):
                (tmp_path / "d" / str(number)).touch()
            for number in range(20):
                (tmp_path / "d" / str(number)).unlink()

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(come_and_go)
        for _ in range(300):
            assert "stays" in storage.names("d")
            assert storage.sizes("d")["stays"] == 1
        stop.set()
        coming.result()


def test_a_folder_moves_with_all_below_it(storage: Storage) -> None:
    storage.write(".aside/one", b"1")
    storage.write(".aside/sub/two", b"2")
    storage.rename(".aside", "place")
    assert not storage.exists(".aside")
    assert storage.names("place") == ["one", "sub"]
    assert storage.read("place/sub/two") == b"2"


def test_removing_a_file_a_folder_and_what_is_not_there(storage: Storage) -> None:
    storage.write("d/a", b"1")
    storage.write("d/b", b"1")
    storage.remove("d/a")
    assert storage.names("d") == ["b"]
    storage.remove("d")
    assert not storage.exists("d/b")
    storage.remove("d")
    with pytest.raises(ValueError, match="root"):
        storage.remove("")


def test_open_write_streams_a_file(storage: Storage) -> None:
    with storage.open_write("deep/er/file") as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
    assert storage.read("deep/er/file") == b"one two"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_no_key_leads_out_of_the_root(storage: Storage, key: str) -> None:
    with pytest.raises(UserError, match="not a path below"):
        storage.path(key)


def test_upload_and_download(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"content")
    storage.upload(tmp_path / "local", "up/there")
    storage.download("up/there", tmp_path / "down" / "again")
    assert (tmp_path / "down" / "again").read_bytes() == b"content"


def test_create_takes_a_name_once(storage: Storage) -> None:
    assert storage.create("lock", b"first")
    assert not storage.create("lock", b"second")
    assert storage.read("lock") == b"first"
    assert storage.names("") == ["lock"]


def test_of_many_that_create_at_once_one_wins_and_nobody_sees_it_empty(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    gate = threading.Barrier(8)

    def contend(number: int) -> tuple[bool, bytes]:
        gate.wait()
        won = storage.create("lock", str(number).encode() * 1000)
        return won, storage.read("lock")

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(contend, range(8)))
        assert sum(won for won, _ in outcomes) == 1
        winner = [won for won, _ in outcomes].index(True)
        assert {seen for _, seen in outcomes} == {str(winner).encode() * 1000}
        storage.remove("lock")


def test_a_write_that_fails_keeps_the_old_content_and_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("state", b"old")
    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        storage.write("state", bytes(10_000))
    assert storage.read("state") == b"old"
    assert storage.names("") == ["state"]


def test_a_folder_may_be_moved_as_soon_as_a_file_that_is_waited_for_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 moves a checkpoint's folder that is aside once the last part has its name."""
    replace = os.replace

    def replace_and_move(source: Path, target: Path) -> None:
        replace(source, target)
        os.rename(target.parent, tmp_path / "committed")

    monkeypatch.setattr(os, "replace", replace_and_move)
    Storage(str(tmp_path)).write("aside/part", b"of the last rank")
    assert (tmp_path / "committed/part").read_bytes() == b"of the last rank"


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "file").write_bytes(b"sacred")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "original")
    Storage(str(tmp_path / "root")).remove("link")
    assert (tmp_path / "original" / "file").read_bytes() == b"sacred"


def test_home_is_expanded_and_free_bytes_need_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = Storage("~/not/there/yet")
    assert storage.path("x") == f"{tmp_path}/not/there/yet/x"
    assert nearest_folder(Path(storage.root)) == tmp_path
    free = storage.free_bytes()
    assert free is not None and free > 0
    assert Storage("memory://x").free_bytes() is None


def test_a_tree_is_verified_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "manifest").write_bytes(b"")
    sync_tree(tmp_path)
    digests = tree_digests(tmp_path, leave_out=["manifest"])
    assert list(digests) == ["b", "sub/a"]
    verify_tree(tmp_path, digests)
    (tmp_path / "sub" / "a").write_bytes(b"A")
    with pytest.raises(IntegrityError, match="sub/a: the bytes differ"):
        verify_tree(tmp_path, digests)
    (tmp_path / "sub" / "a").unlink()
    with pytest.raises(IntegrityError, match="sub/a: the file is missing"):
        verify_tree(tmp_path, digests)


def test_digests_are_sha256_and_a_fingerprint_ignores_the_order_of_keys(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert digest(b"abc") == file_digest(tmp_path / "f")
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    value = {"b": 1, "a": [1, {"d": 2, "c": "é"}]}
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value, sort_keys=True)))
    assert fingerprint(value) != fingerprint({**value, "b": 2})
