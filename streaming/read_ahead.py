"""Loader workers: processes that read and pack steps ahead, each joined to its rank by a socket pair.

A worker is started by exec, not by fork, imports no torch (it is ready in 0.3 s and takes 40 MB), and does not import the
program's main module, so it is safe beside threads, CUDA and Ray, and in a daemonic process. Nothing lies in shared memory,
so nothing can be left behind: whichever side dies, the kernel closes the socket and the other side sees it at once.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe

from outgrow.errors import OutgrowError, TrainingError
from outgrow.processes import start_python
from outgrow.streaming.steps import PackedStep, ReadPlan, StepReader

_READ_AHEAD_BYTES = 256 * 2**20
_READ_AHEAD_STEPS = 8
_BYTES_A_TOKEN = 36
"""int64 token, target and position, float32 weight, int32 segment and pair."""
_START = "from outgrow.streaming.read_ahead import serve; serve({fd}, {parent})"


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The steps of worker ``number``: every ``stride``-th from ``first``, below ``stop``."""

    plan: ReadPlan
    number: int
    first: int
    stop: int
    stride: int


class Worker:
    """One loader worker seen from its rank; ``take`` gives its steps in order. ``position`` is the first step that has not come
    from it."""

    def __init__(self, assignment: Assignment, *, depth: int) -> None:
        ours, theirs = Pipe(duplex=True)
        code = _START.format(fd=theirs.fileno(), parent=os.getpid())
        self._process = start_python(code, pass_fds=(theirs.fileno(),))
        theirs.close()
        self.position = assignment.first
        self._stride = assignment.stride
        self._connection = ours
        self._room = threading.Semaphore(depth)
        self._closing = False
        self._received: queue.SimpleQueue[PackedStep | OutgrowError] = queue.SimpleQueue()
        self._connection.send(assignment)
        self._thread = threading.Thread(target=self._receive, name="outgrow-read-ahead", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ready(self) -> int:
        """Steps that were received and not taken."""
        return self._received.qsize()

    def take(self) -> PackedStep:
        """The next step; waits for it. Raises what the worker raised, or ``TrainingError`` where it died."""
        item = self._received.get()
        if isinstance(item, OutgrowError):
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """End the process and the thread; steps not taken are dropped."""
        self._process.kill()
        self._process.wait()
        self._closing = True
        self._room.release()
        self._thread.join()
        self._connection.close()

    def _receive(self) -> None:
        """Runs in a thread of the rank: takes in steps while there is room, until the worker is done, fails or dies."""
        while self._room.acquire() and not self._closing:
            try:
                item = self._connection.recv()
            except (EOFError, OSError):
                self._received.put(TrainingError(_obituary(self._process)))
                return
            self._received.put(item)
            if isinstance(item, OutgrowError):
                return
            self.position = item.step + self._stride


def _obituary(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"loader worker {process.pid} {how} before its last step"


def read_ahead_depth(plan: ReadPlan) -> int:
    """Steps that a worker may be ahead, the longest rows of the run in all of them: bounded in number and in bytes, at least
    one."""
    rows = plan.layout.accumulation * plan.layout.micro_rows
    longest = max(phase.sequence_length for phase in plan.mix.phases)
    return max(1, min(_READ_AHEAD_STEPS, _READ_AHEAD_BYTES // (rows * longest * _BYTES_A_TOKEN)))


# --- in the worker ----------------------------------------------------------------------------------------------------


def serve(fd: int, parent: int) -> None:
    """Main of a worker: send the assigned steps over the socket ``fd``, or the error that stopped it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the rank decides what ends
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection: Connection = Connection(fd)
    try:
        assignment: Assignment = connection.recv()
        for step in _steps(assignment):
            connection.send(step)
        connection.recv()  # nothing more is sent; waits until the rank closes
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the rank closed, or died


def _steps(assignment: Assignment) -> Iterator[PackedStep | OutgrowError]:
    try:
        reader = StepReader(assignment.plan, assignment.number)
        for step in range(assignment.first, assignment.stop, assignment.stride):
            yield reader.read(step)
    except OutgrowError as error:
        yield error
    except Exception:
        yield TrainingError(f"a loader worker failed:\n{traceback.format_exc()}")


def _end_with(parent: int) -> None:
    """A socket that some other process inherited stays open when the rank is killed; its pid tells all the same."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
