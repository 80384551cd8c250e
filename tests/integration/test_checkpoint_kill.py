"""kill -9 at every operation of a save, and at random moments: the newest whole checkpoint always loads.

Run as a script this file is what gets killed: it forks once a case, since importing torch takes longer than the case.
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from outgrow.storage import Storage
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.reader import CheckpointReader
from outgrow.trainers.checkpoint.resume import resume
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.regions import fill

RUN = "runs/tiny"
CHECKPOINTS = f"{RUN}/checkpoints"
RANDOM_KILLS = 25


class Countdown:
    """Kills this process at the operation that it was set to; operations are counted from 0."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0

    def tick(self) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class DyingFile(io.RawIOBase):
    """A file that counts its writes, each of them in two halves, so that a write may be torn."""

    def __init__(self, file: BinaryIO, countdown: Countdown) -> None:
        self._file, self._countdown = file, countdown

    def write(self, data: Any) -> int:
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._countdown.tick()
            self._file.write(part)
            self._file.flush()
        return len(data)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


class DyingStorage(Storage):
    """A storage that kills the process before one of its operations; a folder is removed file by file, as rmtree does."""

    def __init__(self, root: str, countdown: Countdown) -> None:
        super().__init__(root)
        self._countdown = countdown

    def open_write(self, key: str) -> BinaryIO:
        self._countdown.tick()
        return cast(BinaryIO, DyingFile(super().open_write(key), self._countdown))

    def write(self, key: str, data: bytes) -> None:
        self._countdown.tick()
        folder, _, name = key.rpartition("/")
        Path(self.path(f"{folder}/.{name}.0.tmp")).write_bytes(data[: len(data) // 2])
        self._countdown.tick()
        Path(self.path(f"{folder}/.{name}.0.tmp")).unlink()
        super().write(key, data)

    def rename(self, source: str, target: str) -> None:
        self._countdown.tick()
        super().rename(source, target)

    def remove(self, key: str) -> None:
        for name in self.names(key) if Path(self.path(key)).is_dir() else []:
            self._countdown.tick()
            super().remove(f"{key}/{name}")
        self._countdown.tick()
        super().remove(key)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model/w": torch.arange(2000.0) + step, "optim/w/step": torch.tensor(float(step))}


def checkpointer(storage: Storage, attempt: str, rank: int = 0, world: int = 1) -> Checkpointer:
    return Checkpointer(
        storage, Group(RUN, attempt, rank, world), tensors_of(0), Retention(2, 0), chunk_bytes=3000, patience_s=20
    )


def save(saver: Checkpointer, step: int) -> None:
    saver.save(tensors_of(step), StepState(step, {"next_step": step}, {}, {}))
    saver.wait()
    assert saver.failures == 0, saver.results()


def newest_step(storage: Storage) -> int:
    """The step that loads, bit for bit what was saved at it."""
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}

    def fill_all(reader: CheckpointReader) -> None:
        for name, tensor in loaded.items():
            fill(tensor, name, reader)

    resumed = resume(storage, RUN, fill_all)
    assert resumed.reader is not None
    assert resumed.refused == (), "a killed save leaves no committed checkpoint that is not whole"
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_of(resumed.reader.step).items())
    return resumed.reader.step


def in_a_fork(work: Callable[[], None]) -> int:
    """The pid of a forked process that does ``work`` and exits with 0."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_every_operation(root: Path) -> None:
    """Steps 10 and 20 are whole; a save of another is killed before its n-th operation, for every n.

    That of step 30 ends by removing step 10. That of step 20 replaces the one there, as after a fall back: the old one is given
    up just before the new one takes its place.
    """
    for step in (30, 20):
        outcomes, at = [], 0
        while True:
            storage = Storage(str(root / f"{step}-{at}"))
            first = checkpointer(storage, "first")
            save(first, 10)
            save(first, 20)
            dying = DyingStorage(storage.root_url, Countdown(at))
            code = exit_code(in_a_fork(lambda d=dying, s=step: save(checkpointer(d, "second"), s)))  # type: ignore[misc]
            outcomes.append(newest_step(storage))
            third = checkpointer(storage, "third")
            names = storage.names(CHECKPOINTS)
            assert all(name.startswith("step-") for name in names) and names, names
            save(third, 40)
            assert newest_step(storage) == 40
            assert len(storage.names(CHECKPOINTS)) == 2
            if code == 0:
                break
            assert code == -signal.SIGKILL
            at += 1
        if step == 30:
            committed = outcomes.index(30)
            assert outcomes == [20] * committed + [30] * (len(outcomes) - committed)
        assert set(outcomes) == ({20, 30} if step == 30 else {10, 20})
        print(f"step {step}: killed at {at} operations", flush=True)


def kill_at_random_moments(root: Path) -> None:
    """Two ranks save step after step and are killed together, or one of them alone, again and again on the same run."""
    storage = Storage(str(root / "random"))
    draw = random.Random(1)
    step = 0
    for attempt in range(RANDOM_KILLS):
        read, write = os.pipe()

        def work(rank: int, first: int = step, attempt: int = attempt, write: int = write) -> None:
            saver = checkpointer(storage, f"attempt{attempt}", rank, 2)
            for number in range(first + 1, first + 1000):
                saver.save(tensors_of(number), StepState(number, {}, {}, {}))
                if (ref := saver.wait()) is not None:
                    os.write(write, ref.step.to_bytes(4, "little"))

        pids = [in_a_fork(lambda rank=rank: work(rank)) for rank in range(2)]  # type: ignore[misc]
        # The first attempt commits at least once; later ones are killed at any moment, before their first commit too.
        told = os.read(read, 4) if attempt == 0 else b""
        time.sleep(draw.uniform(0, 0.15))
        for pid in draw.sample(pids, 2):
            os.kill(pid, signal.SIGKILL)
            time.sleep(draw.choice([0, 0.02]))
        assert {exit_code(pid) for pid in pids} == {-signal.SIGKILL}
        os.close(write)
        while more := os.read(read, 4):
            told = more
        os.close(read)
        found = newest_step(storage)
        assert found >= max(step, int.from_bytes(told, "little")), "what was said to be committed is there"
        step = found
    print(f"{RANDOM_KILLS} random kills, reached step {step}", flush=True)


def test_a_save_killed_anywhere_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed at") == 2 and "random kills" in done.stdout


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at_every_operation(Path(sys.argv[1]))
    kill_at_random_moments(Path(sys.argv[1]))
