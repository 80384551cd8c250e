"""Ranks as plain processes: they find each other, their failures come back as what they were, and none is ever left."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
from datasets_of_cards import card, index_card

from outgrow.cluster.local import LocalContext, run_local
from outgrow.contracts import Context, JobSpec, RunRef, StepRecord, WorkerResult
from outgrow.errors import DataError, RestartError, TrainingError

CARD = card(index_card(8, {"a": (10, 80)}))


def job(workers: int, **recipe: object) -> JobSpec:
    run = RunRef(name="test", folder="runs/test", fingerprint="f")
    return JobSpec(
        recipe=recipe,
        site={},
        card=CARD,
        run=run,
        workers=workers,
        threads_per_worker=1,
        device="cpu",
        launched=time.time(),
    )


def result(value: float) -> WorkerResult:
    return WorkerResult(step=1, tokens=0, train_loss=value, validation_loss=None, checkpoint="", seconds=0.0)


def record(attempt: str, step: int) -> StepRecord:
    return StepRecord(kind="step", attempt=attempt, time=0.0, step=step, steps=3)


def all_reduce(job: JobSpec, context: Context) -> WorkerResult:
    import torch
    import torch.distributed as dist

    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert (context.local_rank, context.local_world, context.node_rank) == (context.rank, context.world, 0)
    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    attempts: list[str | None] = [None] * context.world
    dist.all_gather_object(attempts, context.attempt)
    assert set(attempts) == {context.attempt}
    for step in (1, 2, 3):
        context.report(record(context.attempt, step))
    context.barrier()
    atexit.register(print, "Python was taken down")
    print("said", end="")
    return result(float(total) + 100 * context.rank)


def alone(job: JobSpec, context: Context) -> WorkerResult:
    import torch.distributed as dist

    context.barrier()
    context.report(record(context.attempt, 1))
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return result(float(os.getpid()))


def fails_on_rank_1(job: JobSpec, context: Context) -> WorkerResult:
    import torch
    import torch.distributed as dist

    if context.rank == 1:
        if job.recipe["error"] == "user":
            raise DataError("row 7 is torn", where="shard 3", hint="build again")
        raise ZeroDivisionError("by zero on purpose")
    dist.all_reduce(torch.ones(1))  # waits for rank 1, and breaks when it goes
    return result(0.0)


def gives_up_shards(job: JobSpec, context: Context) -> WorkerResult:
    """The last rank finds a bad shard at each start, until so many are given up."""
    given_up = list(Path(str(job.recipe["folder"])).iterdir())
    if context.rank == context.world - 1 and len(given_up) < int(str(job.recipe["bad"])):
        (Path(str(job.recipe["folder"])) / str(len(given_up))).touch()
        raise RestartError(f"shard {len(given_up)} is given up")
    context.barrier()
    context.report(record(context.attempt, len(given_up)))
    return result(0)


class Cycle:
    """What refers to itself, as an engine does."""

    def __init__(self) -> None:
        self.itself = self


LEFT: list[weakref.ref[Cycle]] = []


def leaves_a_model(job: JobSpec, context: Context) -> WorkerResult:
    engine = Cycle()
    LEFT.append(weakref.ref(engine))
    if len(LEFT) == 1:
        raise RestartError("shard 0 is given up")
    return result(sum(left() is not None for left in LEFT))


def asks_in_vain(job: JobSpec, context: Context) -> WorkerResult:
    raise RestartError("shard 0 is given up")


def waits(job: JobSpec, context: Context) -> WorkerResult:
    """Rank 1 writes down its pid, and its child's, and all wait in a collective."""
    import torch
    import torch.distributed as dist

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(job.recipe["folder"], f"{context.rank}.pids").write_text(f"{os.getpid()} {child.pid}\n")
    if context.rank == 1:
        if job.recipe["then"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.recipe["then"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
    return result(0.0)


def drive(folder: str) -> None:
    """The driver that ``test_killed_driver`` kills."""
    run_local(job(2, folder=folder, then="stop"), waits, on_record=print)


def pids(folder: Path) -> list[int]:
    """Pids of two ranks and their children, once both have written them down."""
    for _ in range(600):
        files = sorted(folder.glob("*.pids"))
        texts = [file.read_text() for file in files]
        if len(texts) == 2 and all(text.endswith("\n") for text in texts):
            return [int(pid) for text in texts for pid in text.split()]
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in processes):
        assert time.monotonic() < deadline, [pid for pid in processes if alive(pid)]
        time.sleep(0.05)


def test_two_ranks_share_a_group_and_rank_0_reports(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[StepRecord] = []
    done = run_local(job(2), all_reduce, on_record=seen.append)
    assert done.worker.train_loss == 3.0
    assert done.restarts == 0
    assert [r.step for r in seen] == [1, 2, 3]
    assert len({r.attempt for r in seen}) == 1
    assert capfd.readouterr().out == "saidsaid"  # gloo's threads abort a rank that is taken down under them


def test_one_rank_runs_here_and_leaves_no_group_that_it_made() -> None:
    import torch.distributed as dist

    seen: list[StepRecord] = []
    done = run_local(job(1), alone, on_record=seen.append)
    assert done.worker.train_loss == os.getpid()
    assert len(seen) == 1
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", ["user", "other"])
def test_the_failing_ranks_own_exception_surfaces(error: str) -> None:
    with pytest.raises(DataError if error == "user" else TrainingError) as caught:
        run_local(job(2, error=error), f"{__name__}:fails_on_rank_1", on_record=print)
    if error == "user":
        assert str(caught.value) == "shard 3: row 7 is torn\n  build again"
        assert "raised on rank 1" in caught.value.__notes__[0]
    else:
        assert caught.value.message.startswith("rank 1 failed: ZeroDivisionError: by zero on purpose\nTraceback")


@pytest.mark.parametrize(("workers", "bad"), [(1, 5), (2, 1)])
def test_ranks_are_started_again_where_one_asks_for_it(tmp_path: Path, workers: int, bad: int) -> None:
    seen: list[StepRecord] = []
    done = run_local(job(workers, folder=str(tmp_path), bad=bad), gives_up_shards, on_record=seen.append)
    assert (done.restarts, [r.step for r in seen]) == (bad, [bad])


def test_what_a_start_held_is_gone_before_the_next() -> None:
    """Two models would not fit on the card."""
    gc.disable()
    try:
        done = run_local(job(1), leaves_a_model, on_record=print)
    finally:
        gc.enable()
    assert (done.restarts, done.worker.train_loss) == (1, 1.0)


def test_a_rank_that_asks_twice_for_the_same_is_not_started_again() -> None:
    with pytest.raises(RestartError, match="shard 0 is given up"):
        run_local(job(1), asks_in_vain, on_record=print)


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        run_local(job(2, folder=str(tmp_path), then="die"), waits, on_record=print)
    wait_until_gone(pids(tmp_path))  # what the ranks started is gone with them


def test_killed_driver_leaves_no_rank_not_even_a_stopped_one(tmp_path: Path) -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import drive; drive({str(tmp_path)!r})"
    driver = subprocess.Popen([sys.executable, "-c", code])
    rank_0, child_0, rank_1, child_1 = pids(tmp_path)
    try:
        assert alive(rank_0)
        assert alive(rank_1)
        driver.kill()
        driver.wait()
        wait_until_gone([rank_0, rank_1])
    finally:
        for child in filter(alive, (child_0, child_1)):  # what a rank starts watches over itself: see streaming's loader
            os.kill(child, signal.SIGKILL)


def test_an_error_while_watching_ends_the_ranks(tmp_path: Path) -> None:
    def refuse(record: StepRecord) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())  # multiprocessing's resource tracker, after other tests
    with pytest.raises(KeyboardInterrupt):
        run_local(job(2), all_reduce, on_record=refuse)
    assert not [p for p in set(psutil.Process().children()) - before if p.status() != psutil.STATUS_ZOMBIE]


def test_a_function_that_no_rank_could_import_is_refused() -> None:
    with pytest.raises(ValueError, match="at the top of an importable module"):
        run_local(job(2), lambda job, context: result(0.0), on_record=print)


def test_context_is_a_context() -> None:
    context: Context = LocalContext(rank=0, world=1, attempt="a", cause="", on_record=print)
    assert context.local_world == 1
