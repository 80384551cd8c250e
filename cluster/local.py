"""A run as plain processes on this machine, without Ray: one a rank, joined by gloo or nccl over loopback.

Each rank is a fresh interpreter, so that its environment is set before anything reads it; it talks to the driver over one
socket pair: the job goes in, step records and the result or the exception come out. A rank does not outlive its driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, TypeAlias, cast

from outgrow.contracts import JobSpec, RestartCause, RunResult, StepRecord, TrainWorker, WorkerResult
from outgrow.errors import OutgrowError, RestartError, TrainingError
from outgrow.processes import end_rank

OnRecord: TypeAlias = Callable[[StepRecord], None]

_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_ECHO_S = 0.3
"""When a rank is lost, the others fail too, with a broken connection; within this time the real cause is known."""
_EXIT_S = 10.0
_COLLECTIVE_S = 1800.0
"""A rank waits so long for all others, as under Ray Train; nccl's own 10 minutes end while rank 0 digests a checkpoint."""
_OUTBOX_RECORDS = 1024


@dataclass(frozen=True, kw_only=True)
class LocalContext:
    """``contracts.Context`` of a rank that runs as a plain process; all ranks share one machine."""

    rank: int
    world: int
    attempt: str
    cause: RestartCause
    on_record: OnRecord = field(repr=False)
    node_rank: int = 0

    @property
    def local_rank(self) -> int:
        return self.rank

    @property
    def local_world(self) -> int:
        return self.world

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def report(self, record: StepRecord) -> None:
        if self.rank == 0:
            self.on_record(record)


def run_local(job: JobSpec, train_worker: TrainWorker | str, *, on_record: OnRecord) -> RunResult:
    """What rank 0 returned, once all ``job.workers`` ranks are done; one rank alone runs in this process, without a group.

    ``train_worker`` is a function of an importable module, or its name ``package.module:function``. ``on_record`` is called in
    this thread, for one rank alone in that of its records. A group is started again where a rank asks for it, but after no
    failure. Raises what the first failing rank raised: an ``OutgrowError`` as itself, anything else as ``TrainingError`` with
    its traceback. No rank is left running, however this ends.
    """
    restarts, before = 0, ""
    while True:
        try:
            worker = _run_group(job, train_worker, on_record, "asked" if restarts else "")
            return RunResult(run=job.run, worker=worker, restarts=restarts)
        except RestartError as error:
            if str(error) == before:
                raise  # what it has dealt with is still there
            restarts, before = restarts + 1, str(error)
        # A rank alone starts again in this process: its model, which refers to itself, must be gone before there is another.
        gc.collect()


def _run_group(job: JobSpec, train_worker: TrainWorker | str, on_record: OnRecord, cause: RestartCause) -> WorkerResult:
    """One start of all ranks, from the newest checkpoint to the end."""
    attempt = secrets.token_hex(4)
    if job.workers == 1:
        context = LocalContext(rank=0, world=1, attempt=attempt, cause=cause, on_record=on_record)
        with _own_group():
            return _resolve(train_worker)(job, context)
    name = train_worker if isinstance(train_worker, str) else _name_of(train_worker)
    with socket.create_server((_LOOPBACK, 0)) as listener, contextlib.ExitStack() as started:
        ranks = [_start(job, name, rank, attempt, cause, listener, started) for rank in range(job.workers)]
        worker = _follow(ranks, on_record)
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(timeout=_EXIT_S)
    return worker


@contextlib.contextmanager
def _own_group() -> Iterator[None]:
    """Ends the process group that an engine makes for one rank alone where it needs one; nccl complains of one that is left."""

    def is_there() -> bool:
        distributed = sys.modules.get("torch.distributed")
        return distributed is not None and distributed.is_initialized()

    before = is_there()
    try:
        yield
    finally:
        if is_there() and not before:
            sys.modules["torch.distributed"].destroy_process_group()


def _name_of(train_worker: TrainWorker) -> str:
    module, name = getattr(train_worker, "__module__", "__main__"), getattr(train_worker, "__qualname__", "<")
    if module == "__main__" or "<" in name or "." in name:
        raise ValueError(f"train_worker must be a function at the top of an importable module, not {module}:{name}")
    return f"{module}:{name}"


def _resolve(train_worker: TrainWorker | str) -> TrainWorker:
    if not isinstance(train_worker, str):
        return train_worker
    module, _, name = train_worker.partition(":")
    return cast(TrainWorker, getattr(importlib.import_module(module), name))


# --- the driver's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Task:
    """All that a rank is told. ``listener`` is the descriptor of the socket that the rendezvous of rank 0 serves, so that no
    port is chosen before it is taken."""

    job: JobSpec
    train_worker: str
    rank: int
    attempt: str
    cause: RestartCause
    port: int
    listener: int


@dataclass(kw_only=True)
class _Rank:
    """A started rank as its driver sees it."""

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    lost: bool = False

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What has arrived; sets ``lost`` when nothing more can."""
        ended = self.process.poll() is not None
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, ConnectionResetError):
            ended = True
        self.lost = ended

    def death(self) -> TrainingError:
        """How a rank ended that said nothing."""
        code = self.process.wait(timeout=_EXIT_S)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "the kernel kills a process when memory runs out: see dmesg" if code == -signal.SIGKILL else ""
        return TrainingError(f"rank {self.number} (pid {self.process.pid}) {how}", hint=hint)

    def kill(self) -> None:
        """Ends the rank and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def _start(
    job: JobSpec,
    train_worker: str,
    rank: int,
    attempt: str,
    cause: RestartCause,
    listener: socket.socket,
    started: contextlib.ExitStack,
) -> _Rank:
    port = listener.getsockname()[1]
    task = _Task(
        job=job, train_worker=train_worker, rank=rank, attempt=attempt, cause=cause, port=port, listener=listener.fileno()
    )
    ours, theirs = Pipe()
    with theirs:
        # The driver's own search path, so that the rank imports the very modules that the driver did.
        code = f"import sys; sys.path[:] = {sys.path!r}; from outgrow.cluster.local import serve; serve({theirs.fileno()})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | worker_environment(job, rank, port),
            pass_fds=[theirs.fileno(), *([listener.fileno()] if rank == 0 else [])],
            # A group of its own: Ctrl-C reaches the driver alone, and what a rank started ends with it.
            start_new_session=True,
        )
    spawned = _Rank(number=rank, process=process, connection=ours)
    started.callback(spawned.kill)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # died at once: _follow says how
        ours.send(task)
    return spawned


def worker_environment(job: JobSpec, rank: int, port: int) -> dict[str, str]:
    """Variables of a rank's process beyond the driver's own."""
    world = str(job.workers)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
        "OMP_NUM_THREADS": str(job.threads_per_worker),
    }


def _follow(ranks: list[_Rank], on_record: OnRecord) -> WorkerResult:
    """The result of rank 0 once every rank has one; raises at the first that fails."""
    results: dict[int, WorkerResult] = {}
    while len(results) < len(ranks):
        pending = [rank for rank in ranks if rank.number not in results]
        # With a timeout: a process that a rank forked may hold the socket open after the rank itself is gone.
        wait([rank.connection for rank in pending], timeout=_POLL_S)
        for rank in pending:
            for kind, value in rank.messages():
                if kind == "record":
                    on_record(value)
                elif kind == "result":
                    results[rank.number] = value
                else:
                    raise _cause(rank, value, ranks)
            if rank.lost and rank.number not in results:
                raise _cause(rank, None, ranks)
    return results[0]


def _cause(first: _Rank, error: tuple[float, OutgrowError] | None, ranks: list[_Rank]) -> OutgrowError:
    """Why the group failed: a rank that died without a word, else the error that was raised first on the machine's clock."""
    time.sleep(_ECHO_S)
    errors = [error] if error else []
    spoke = {first.number} if error else set()
    for rank in ranks:
        said = [value for kind, value in rank.messages() if kind == "error"]
        errors += said
        spoke |= {rank.number} if said else set()
    for rank in ranks:
        if rank.number not in spoke and rank.process.poll():
            return rank.death()
    return min(errors, key=lambda raised: raised[0])[1] if errors else first.death()


# --- the rank's side --------------------------------------------------------------------------------------------------


class _Outbox:
    """Sends from a thread of its own, so that the training loop never waits for the driver."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._messages: queue.Queue[tuple[str, Any]] = queue.Queue(_OUTBOX_RECORDS)
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def record(self, record: StepRecord) -> None:
        # A driver that is this far behind misses records on its display; the run's events.jsonl has them all.
        with contextlib.suppress(queue.Full):
            self._messages.put_nowait(("record", record))

    def last(self, kind: str, value: Any) -> None:
        """Send the last message and return when it is out."""
        self._messages.put((kind, value))
        self._thread.join()

    def _send(self) -> None:
        while True:
            message = self._messages.get()
            self._connection.send(message)
            if message[0] != "record":
                return


def serve(descriptor: int) -> NoReturn:
    """Be one rank: take the task from the driver, train, and hand back the result or the exception."""
    connection: Connection[Any, Any] = Connection(descriptor)
    _end_with_driver()
    task = cast(_Task, connection.recv())
    threading.Thread(target=_exit_at_eof, args=(connection,), name="driver-watch", daemon=True).start()
    outbox = _Outbox(connection)
    try:
        result = _train(task, outbox)
    except BaseException as error:
        outbox.last("error", (time.monotonic(), _portable(error, task.rank)))
        end_rank(1)
    outbox.last("result", result)
    end_rank(0)


def _train(task: _Task, outbox: _Outbox) -> WorkerResult:
    import torch.distributed as dist

    _join_group(task)
    context = LocalContext(
        rank=task.rank, world=task.job.workers, attempt=task.attempt, cause=task.cause, on_record=outbox.record
    )
    result = _resolve(task.train_worker)(task.job, context)
    context.barrier()  # rank 0 serves the rendezvous until every rank is done
    dist.destroy_process_group()
    return result


def _join_group(task: _Task) -> None:
    import torch
    import torch.distributed as dist

    on_gpu = task.job.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(task.rank)
    world, first = task.job.workers, task.rank == 0
    listener = task.listener if first else None
    store = dist.TCPStore(_LOOPBACK, task.port, world, is_master=first, master_listen_fd=listener)  # type: ignore[attr-defined]
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=task.rank, world_size=world, timeout=timedelta(seconds=_COLLECTIVE_S))


def _portable(error: BaseException, rank: int) -> OutgrowError:
    """``error`` as something that the driver can unpickle whatever modules it has, with the traceback of this rank."""
    text = "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, OutgrowError):
        error.add_note(f"raised on rank {rank}:\n{text}")
        return error
    return TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}\n{text}")


def _end_with_driver() -> None:
    """On Linux the kernel kills this process when the driver's thread that started it is gone, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_at_eof(connection: Connection[Any, Any]) -> None:
    """Ends this rank and what it started when the driver is gone; also where there is no such signal, or it came too early."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os.killpg(0, signal.SIGKILL)
