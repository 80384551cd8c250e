"""A stalled step leaves a dump that tells what the rank waits for; run as a script it is one rank of two.

python tests/unit/test_stall_watch.py RANK FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from outgrow.processes import end_rank
from outgrow.trainers import stall_watch
from outgrow.trainers.stall_watch import COLLECTIVES, STACKS, StallWatch, write_dump


def hang_until(folder: Path, text: str) -> Path:
    """The stacks once they hold ``text``."""
    deadline = time.monotonic() + 20
    while not (found := [path for path in folder.glob(f"*-rank-00003/{STACKS}") if text in path.read_text()]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_one_dump_for_each_stall_and_none_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "POLL_S", 0.01)
    made: list[Path] = []
    monkeypatch.setattr(stall_watch, "write_dump", lambda folder, rank: made.append(folder) or folder)
    open_s = 0.5
    watch = StallWatch(tmp_path, 3, lambda: 1.0, lambda: open_s)
    time.sleep(0.1)
    assert made == []
    for stalls in (1, 2):
        open_s = 1.5
        time.sleep(0.2)
        assert made == [tmp_path] * stalls
        open_s = 0.1
        time.sleep(0.1)
    watch.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "stall-watch"]


def test_the_dump_has_the_stack_of_the_thread_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "POLL_S", 0.01)
    since = time.monotonic()
    watch = StallWatch(tmp_path, 3, lambda: 0.5, lambda: time.monotonic() - since)
    stacks = hang_until(tmp_path, "in hang_until")
    watch.close()
    assert not (stacks.parent / COLLECTIVES).exists()


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stall_watch, "POLL_S", 0.01)
    (tmp_path / "file").write_text("")
    watch = StallWatch(tmp_path / "file", 3, lambda: 0.0, lambda: 1.0)
    time.sleep(0.2)
    watch.close()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the step of rank 3 is stalled; what it does is in no file"
    ]


def test_the_oldest_dumps_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (tmp_path / f"20200101T0000{number:02d}-rank-00000").mkdir()
    (tmp_path / "20200101T000000-agent").mkdir()
    newest = write_dump(tmp_path, 0)
    left = sorted(path.name for path in tmp_path.glob("*-rank-*"))
    assert len(left) == stall_watch.KEPT and left[-1] == newest.name and left[0] == "20200101T000011-rank-00000"
    assert (tmp_path / "20200101T000000-agent").exists()


def test_the_dump_of_a_rank_that_waits_names_the_collective(tmp_path: Path) -> None:
    """Two real ranks, of which one sleeps instead of coming to the third collective."""
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=os.environ) for rank in range(2)]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    dump = next(tmp_path.glob("stalls/*-rank-00000"))
    waiting = [entry for entry in json.loads((dump / COLLECTIVES).read_text())["entries"] if not entry["retired"]]
    assert [(entry["profiling_name"], entry["collective_seq_id"], entry["input_sizes"]) for entry in waiting] == [
        ("gloo:all_reduce", 3, [[5]])
    ]
    assert "all_reduce" in (dump / STACKS).read_text()


def _main(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    stall_watch.POLL_S = 0.05
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    for size in (3, 4):
        dist.all_reduce(torch.ones(size))
    since = time.monotonic()
    watch = StallWatch(folder / "stalls", rank, lambda: 0.5, lambda: time.monotonic() - since if rank == 0 else 0.0)
    done = folder / "stalls"
    while rank == 1 and not list(done.glob(f"*/{COLLECTIVES}")):
        time.sleep(0.05)
    dist.all_reduce(torch.ones(5))
    watch.close()
    end_rank(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
