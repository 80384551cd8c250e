"""Folders that a build is still writing: whose they are, who may go on in them, and who may remove them."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from outgrow.streaming.aside import (
    building_folder,
    discard,
    put_in_place,
    remove_abandoned,
    remove_unfinished,
    unfinished,
)
from outgrow.streaming.manifest import commit


def test_folders_of_dead_builds_are_removed_and_others_kept(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    host = socket.gethostname()
    dead = tmp_path / f".building-{host}-{process.pid}-1234"
    reused = tmp_path / f".building-{host}-{os.getpid()}-1234"
    elsewhere = tmp_path / f".building-else-where-{process.pid}-1234"
    born = int(psutil.Process().create_time() * 1000)
    alive = tmp_path / f".building-{host}-{os.getpid()}-{born - 900}"  # the clock was set since
    resumable = tmp_path / ".unfinished-0123456789abcdef"
    for folder in (dead, reused, elsewhere, alive, resumable):
        folder.mkdir()
    assert remove_abandoned(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {elsewhere.name, alive.name, resumable.name}


def never() -> None:
    raise AssertionError("nobody else is building")


def test_the_next_build_finds_what_the_last_one_left(tmp_path: Path) -> None:
    target = tmp_path / "datasets" / "abc"
    with building_folder(target, never) as folder:
        assert folder is not None
        (folder / "half").write_text("done")
    with building_folder(target, never) as folder:
        assert folder is not None and (folder / "half").read_text() == "done"
        discard(folder)
    assert list(target.parent.iterdir()) == []


def finish(target: Path, folder: Path) -> None:
    (folder / "store").mkdir()
    commit(folder / "store", "store.json", {})
    assert put_in_place(folder / "store", target)
    discard(folder)


def test_a_folder_that_is_removed_while_it_is_asked_for_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mkdir`` finds it there, looks whether it is a folder, and it is gone."""
    mkdir, asked = Path.mkdir, list[Path]()

    def gone_once(path: Path, *args: Any, **how: Any) -> None:
        asked.append(path)
        if len(asked) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *args, **how)

    monkeypatch.setattr(Path, "mkdir", gone_once)
    with building_folder(tmp_path / "abc", lambda: None) as folder:
        assert folder is not None and folder.is_dir() and len(asked) == 2


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-abc").touch()
    with pytest.raises(FileExistsError), building_folder(tmp_path / "abc", lambda: None):
        pass


def test_one_of_many_builds_and_the_others_find_it_done(tmp_path: Path) -> None:
    target, together, found = tmp_path / "abc", threading.Barrier(6), []
    waited: list[int] = []

    def build(number: int) -> None:
        together.wait()
        with building_folder(target, lambda: waited.append(number)) as folder:
            if folder is None:
                found.append(number)
            else:
                finish(target, folder)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]


def test_a_build_that_waits_says_so_and_goes_on_where_the_other_gave_up(tmp_path: Path) -> None:
    target, said = tmp_path / "abc", threading.Event()
    seen: list[str] = []

    def second() -> None:
        with building_folder(target, said.set) as folder:
            assert folder is not None
            seen.append((folder / "half").read_text())

    with building_folder(target, never) as folder:
        assert folder is not None
        waiting = threading.Thread(target=second)
        waiting.start()
        assert said.wait(10)
        (folder / "half").write_text("done")
    waiting.join()
    assert seen == ["done"]


def test_unfinished_builds_are_listed_and_removed_but_not_one_at_work(tmp_path: Path) -> None:
    for name in ("old", "running"):
        with building_folder(tmp_path / name, never) as folder:
            assert folder is not None
            (folder / "x").write_bytes(bytes(1000))
    os.utime(tmp_path / ".unfinished-old", (0, 0))
    with building_folder(tmp_path / "running", never):
        old, running = unfinished(tmp_path)
        assert (old.name, old.in_use, running.name, running.in_use) == ("old", False, "running", True)
        assert old.num_bytes >= 1000 and old.idle_s < 60  # the newest file counts, not the folder
        assert remove_unfinished(old) and not remove_unfinished(running)
    assert [build.name for build in unfinished(tmp_path)] == ["running"]
