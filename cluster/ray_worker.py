"""One rank under Ray Train: what it knows of its surroundings, and the checks before it trains."""

from __future__ import annotations

import platform
import secrets
import socket
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import outgrow
from outgrow.cluster.restarts import RankError
from outgrow.contracts import JobSpec, JsonDict, RestartCause, StepRecord, TrainWorker
from outgrow.errors import ClusterError, OutgrowError

if TYPE_CHECKING:
    from ray.actor import ActorHandle


_ASK_S = 10.0


class Progress:
    """The actor between rank 0 and the driver: keeps what is said until the driver takes it. Runs on the driver's node."""

    def __init__(self) -> None:
        self._said: list[tuple[str, Any]] = []
        self._cause: RestartCause = ""

    def say(self, kind: str, value: Any) -> None:
        self._said.append((kind, value))

    def fail(self, cause: RestartCause) -> None:
        """The worker group has come to an end, and will be started again."""
        self._cause = cause

    def cause(self) -> RestartCause:
        """Why the worker group was started again; empty at its first start."""
        return self._cause

    def take(self) -> list[tuple[str, Any]]:
        said, self._said = self._said, []
        return said


@dataclass(frozen=True, kw_only=True)
class RayContext:
    """``contracts.Context`` of a rank under Ray Train."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node_rank: int
    attempt: str
    cause: RestartCause
    progress: ActorHandle[Progress] = field(repr=False)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def report(self, record: StepRecord) -> None:
        # The reply is never asked for: a call to an actor that is slow or gone costs the same 0.2 ms.
        if self.rank == 0:
            self.progress.say.remote("record", record.to_dict())


def run_rank(job: JobSpec, train_worker: TrainWorker, progress: ActorHandle[Progress]) -> JsonDict:
    """What ``train_worker`` returned on this rank, as JSON; Ray Train hands rank 0's to the driver.

    Raises ``OutgrowError`` as it is, anything else as ``RankError``.
    """
    context = _context(progress)
    try:
        _check_versions(context)
        if context.rank == 0:
            progress.say.remote("start", context.attempt)
        return train_worker(job, context).to_dict()
    except OutgrowError as error:
        error.add_note(f"raised on rank {context.rank}:\n{traceback.format_exc()}")
        raise
    except Exception as error:
        raise RankError(f"{type(error).__name__}: {error}", traceback.format_exc()) from None


def _context(progress: ActorHandle[Progress]) -> RayContext:
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    here = ray.train.get_context()
    return RayContext(
        rank=here.get_world_rank(),
        world=here.get_world_size(),
        local_rank=here.get_local_rank(),
        local_world=here.get_local_world_size(),
        node_rank=here.get_node_rank(),
        attempt=broadcast_from_rank_zero(secrets.token_hex(4)),
        cause=_cause(progress),
        progress=progress,
    )


def _cause(progress: ActorHandle[Progress]) -> RestartCause:
    """Why this start of the group came to be; ``error`` where the driver's actor cannot be asked any more."""
    import ray

    try:
        return cast(RestartCause, ray.get(progress.cause.remote(), timeout=_ASK_S))
    except ray.exceptions.RayError:
        return "error"


def _check_versions(context: RayContext) -> None:
    """Every rank runs the same Python, torch and outgrow as rank 0. Raises ``ClusterError`` naming the nodes that do not."""
    if context.world == 1:
        return
    import torch
    import torch.distributed as dist

    mine = (
        socket.gethostname(),
        {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "outgrow": outgrow.__version__,
        },
    )
    everyone: list[tuple[str, dict[str, str]]] = [mine] * context.world
    dist.all_gather_object(everyone, mine)
    if unlike := unlike_versions(everyone):
        raise ClusterError(
            "the nodes run different versions: " + "; ".join(unlike),
            hint="install the same versions on every node (pip install -c constraints.txt outgrow)",
        )


def unlike_versions(ranks: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """One line for each host and package whose version is not that of rank 0; ``ranks`` are (host, versions) by rank."""
    first_host, expected = ranks[0]
    lines = [
        f"{host} has {package} {version}, {first_host} has {expected[package]}"
        for host, versions in ranks
        for package, version in versions.items()
        if version != expected[package]
    ]
    return sorted(set(lines))
