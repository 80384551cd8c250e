"""What a killed compile leaves behind, tools that are missing, and folders on a disk whose rank has ended."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from doctor import need

from outgrow.errors import PlanError
from outgrow.trainers import extensions, scratch

BUILD = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
from outgrow.trainers import extensions

folder = Path(sys.argv[1])
(folder / "tiny").mkdir(parents=True, exist_ok=True)
extensions.load(
    folder,
    lambda: load("tiny", [sys.argv[2]], build_directory=str(folder / "tiny"), is_python_module=False, is_standalone=False),
)
print("loaded")
"""
CLAIM = """
import sys, time
from pathlib import Path
from outgrow.processes import end_rank
from outgrow.trainers.scratch import claim

folder = claim(Path(sys.argv[1]))
(folder / "state").write_bytes(bytes(1000))
print(folder, flush=True)
time.sleep(float(sys.argv[2]))
if sys.argv[3] == "rank":
    end_rank(0)
"""


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A source of one line, and a compiler that never comes to an end as long as the file ``slow`` is there."""
    need("g++", "ninja")
    path = tmp_path / "tiny.cpp"
    path.write_text("int tiny() { return 1; }\n")
    compiler = tmp_path / "compiler"
    waits = f'case " $* " in *" -c "*) while [ -e {tmp_path}/slow ]; do touch {tmp_path}/compiling; sleep 0.05; done;; esac'
    compiler.write_text(f'#!/bin/sh\n{waits}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    yield path
    (tmp_path / "slow").unlink(missing_ok=True)


@contextmanager
def building(folder: Path, source: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"CXX": str(source.parent / "compiler")}
    command = [sys.executable, "-c", BUILD, str(folder), str(source)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(what: str, seconds: float, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def test_a_killed_compile_does_not_stop_the_next(tmp_path: Path, source: Path) -> None:
    folder, slow = tmp_path / "extensions", tmp_path / "slow"
    slow.touch()
    with building(folder, source):
        wait_until("the compile", 200, (tmp_path / "compiling").exists)
    lock = folder / "tiny/lock"
    assert lock.exists(), "torch would wait for this file to go, for ever"

    with pytest.raises(PlanError, match="have been compiling"):
        extensions.clear_stale_locks(folder, patience_s=0.3)
    assert lock.exists(), "compilers of the killed one are still at work"

    with building(folder, source) as second:
        time.sleep(1)
        assert second.poll() is None
        slow.unlink()
        said, _ = second.communicate(timeout=200)
    assert (said.strip(), second.returncode) == ("loaded", 0)
    assert not lock.exists()


def test_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "tiny/lock"
    lock.parent.mkdir()
    lock.touch()
    assert extensions.clear_stale_locks(tmp_path) == [lock]
    assert extensions.clear_stale_locks(tmp_path) == []


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PlanError, match=r"needs g\+\+ \(package g\+\+\), ninja \(package ninja-build\)") as refused:
        extensions.require_tools("cpu")
    assert "make system-deps" in refused.value.hint


def test_a_missing_libaio_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that finds no header."""
    for name, code in (("g++", 1), ("ninja", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match=r"needs libaio.h \(package libaio-dev\)"):
        extensions.require_tools("cpu")


@contextmanager
def claiming(parent: Path, seconds: float, end: str = "python") -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a folder below ``parent`` for so long, and the folder; ``end`` "rank": as a run's rank ends."""
    command = [sys.executable, "-c", CLAIM, str(parent), str(seconds), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_folders_go_with_their_process_however_it_ends(tmp_path: Path) -> None:
    parent = tmp_path / "tier/offload"
    for end in ("python", "rank"):
        with claiming(parent, 0, end) as (ended, _):
            assert ended.wait(60) == 0
        assert not list(parent.iterdir()), "an end in good order leaves nothing"

    with claiming(parent, 60) as (_, kept):
        with claiming(parent, 60) as (_, left):
            pass
        assert (left / "state").exists(), "it was killed"
        scratch.sweep(parent)
        assert not left.exists()
        assert (kept / "state").exists(), "its process is alive"
        assert sorted(path.name for path in parent.iterdir()) == [kept.name, f"{kept.name}.lock"]


def test_what_another_user_holds_is_left_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_ours(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with claiming(tmp_path, 60) as (_, theirs):
        monkeypatch.setattr(scratch, "_lock", not_ours)
        scratch.sweep(tmp_path)
        assert (theirs / "state").exists()


def test_what_was_renamed_away_stays_and_its_lock_goes(tmp_path: Path) -> None:
    with scratch.claimed(tmp_path, ".out.tmp") as aside:
        (aside / "weights").write_bytes(b"1")
        aside.rename(tmp_path / "out")
    with scratch.claimed(tmp_path, ".other.tmp"), pytest.raises(OSError), scratch.claimed(tmp_path, ".out.tmp") as aside:
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/weights").exists()


def test_a_folder_of_another_name_is_not_swept_though_nobody_holds_it(tmp_path: Path) -> None:
    for name in (".out.tmp-1-a", ".out-2.tmp-1-a", ".out[1].tmp-1-a"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").touch()
    with scratch.claimed(tmp_path, ".out.tmp"), scratch.claimed(tmp_path, ".out[1].tmp"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-2.tmp-1-a", ".out-2.tmp-1-a.lock"]


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with scratch.claimed(tmp_path, ".out.tmp") as first, scratch.claimed(tmp_path, ".out.tmp") as second:
        assert first.is_dir() and second.is_dir() and first != second, "what may be another's is not removed"
    assert not list(tmp_path.iterdir())
