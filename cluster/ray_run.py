"""A run under Ray Train V2: it places and supervises the ranks and starts them again after a loss.

Training resumes from outgrow's own committed checkpoints, never from Ray's. What rank 0 says reaches the driver through an
actor that a thread of the driver asks, so that no rank ever waits to be watched.
"""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from outgrow.cluster.ray_cluster import RayCluster, check_room
from outgrow.cluster.ray_environment import worker_environment
from outgrow.cluster.ray_worker import Progress, run_rank
from outgrow.cluster.restarts import MAX_RESTARTS
from outgrow.contracts import JobSpec, JsonDict, RunResult, StepRecord, TrainWorker, WorkerResult
from outgrow.errors import ClusterError, OutgrowError, TrainingError

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train.v2.torch.torch_trainer import TorchTrainer

OnRecord: TypeAlias = Callable[[StepRecord], None]
OnNotice: TypeAlias = Callable[[str], None]

_POLL_S = 0.25
_TAKE_S = 10.0
_START_ATTEMPTS = 5
"""Times that Ray Train waits for room, a minute each, before the run gives up."""


def run(job: JobSpec, train_worker: TrainWorker, *, cluster: RayCluster, on_record: OnRecord, on_notice: OnNotice) -> RunResult:
    """What rank 0 returned, once all ``job.workers`` ranks are done; must be called in the main thread.

    ``on_record`` and ``on_notice`` (one line for a person) are called in another thread. Raises what a rank raised where that
    is an ``OutgrowError``, ``TrainingError`` with the rank's traceback where it is not, ``ClusterError`` where there is no room
    or Ray was lost, and ``KeyboardInterrupt``.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check_room(cluster.nodes, workers=job.workers, threads=job.threads_per_worker, device=job.device)
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Progress).remote()
    scratch = Path(job.site["cache"]) / "ray-train"
    watch = _Watch(progress, on_record, on_notice)
    try:
        worker = WorkerResult.from_dict(_fit(_trainer(job, train_worker, progress, scratch)))
    finally:
        # Joined before the connection ends: Ray crashes the process where a thread still waits in it then.
        watch.stop()
        shutil.rmtree(scratch / _name(job), ignore_errors=True)
    return RunResult(run=job.run, worker=worker, restarts=watch.restarts)


def _fit(trainer: TorchTrainer) -> JsonDict:
    """What rank 0 returned; raises what ended the run as an error of ours."""
    import ray
    from ray.train import TrainingFailedError

    try:
        result: Any = trainer.fit()  # a Result of V2, typed as that of V1
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise _ours(error) from None
    if result.return_value is None:
        raise TrainingError("Ray Train ended without a result of rank 0")
    return cast(JsonDict, result.return_value)


class _Watch(threading.Thread):
    """Shows what was said to the ``progress`` actor. Without the actor the run goes on unseen, and the driver says so."""

    def __init__(self, progress: ActorHandle[Progress], on_record: OnRecord, on_notice: OnNotice) -> None:
        super().__init__(name="watch", daemon=True)
        self._progress = progress
        self._on_record = on_record
        self._on_notice = on_notice
        self._ended = threading.Event()
        self._starts = 0
        self._failures = 0
        self.start()

    @property
    def restarts(self) -> int:
        return max(0, self._starts - 1)

    def stop(self) -> None:
        """Show what is left, and end."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        import ray

        ended = False
        while not ended:
            ended = self._ended.wait(_POLL_S)
            try:
                said: list[tuple[str, Any]] = ray.get(self._progress.take.remote(), timeout=_TAKE_S)
                for kind, value in said:
                    self._show(kind, value)
            except ray.exceptions.GetTimeoutError:
                continue  # an overloaded machine; at worst the display misses some records
            except ray.exceptions.RayError as error:
                self._on_notice(f"the live display is lost ({type(error).__name__}); events.jsonl of the run has every record")
                return
            except BrokenPipeError:
                return  # nobody reads our output any more, which is no reason to stop a run

    def _show(self, kind: str, value: Any) -> None:
        if kind == "record":
            self._on_record(StepRecord.from_dict(value))
        elif kind == "start":
            self._starts += 1
        elif kind == "restart":
            self._on_notice(f"{value}; starting again from the newest checkpoint")
        else:
            self._failures += 1
            self._on_notice(f"{value}; {_next_start(self._failures)}")


def _trainer(job: JobSpec, train_worker: TrainWorker, progress: ActorHandle[Progress], scratch: Path) -> TorchTrainer:
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from outgrow.cluster.ray_hooks import FinalErrors, GroupConfig, Trainer

    on_gpu = job.device == "cuda"
    # Bound here, not given as train_loop_config: the job holds the site's secrets, and Ray shows the configuration of a run.
    rank: Callable[[], Any] = functools.partial(run_rank, job, train_worker, progress)
    return Trainer(
        rank,
        torch_config=GroupConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=on_gpu, resources_per_worker=_resources(job), placement_strategy="PACK"
        ),
        run_config=RunConfig(
            name=_name(job),
            storage_path=str(scratch),
            # No limit of Ray's own: ``FinalErrors`` counts, for not every restart is a failure.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=_START_ATTEMPTS - 1),
            worker_runtime_env={"env_vars": worker_environment(job.threads_per_worker)},
            callbacks=[FinalErrors(progress)],
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _resources(job: JobSpec) -> dict[str, float]:
    cpus: dict[str, float] = {"CPU": job.threads_per_worker}
    return cpus | {"GPU": 1} if job.device == "cuda" else cpus


def _name(job: JobSpec) -> str:
    return PurePosixPath(job.run.folder).name


def _next_start(failures: int) -> str:
    if failures > MAX_RESTARTS:
        return f"giving up after {MAX_RESTARTS} restarts"
    return f"starting again from the newest checkpoint (restart {failures} of at most {MAX_RESTARTS})"


def _ours(error: BaseException) -> OutgrowError:
    """What ended Ray Train, as an error of ours: the one that a rank raised, where it did."""
    from ray.train import ControllerError

    if isinstance(error, ControllerError):
        # A failing callback arrives wrapped once for each manager that it went through.
        inner: BaseException = error
        while isinstance(inner, ControllerError):
            inner = inner.controller_failure
        if isinstance(inner, OutgrowError):
            return inner
        return ClusterError(f"Ray Train could not run the ranks: {type(inner).__name__}: {inner}")
    return ClusterError(f"the Ray cluster was lost: {error}", hint="the same command resumes from the newest checkpoint")
