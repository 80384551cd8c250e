"""What outgrow changes in Ray Train: who answers Ctrl-C, how ranks find their network, which errors end a run at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util import get_node_ip_address

from outgrow.cluster.ray_worker import Progress
from outgrow.cluster.restarts import MAX_RESTARTS, describe_failure, final_error, is_asked_for
from outgrow.errors import TrainingError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_TorchBackend: Any = TorchConfig().backend_cls


class Trainer(TorchTrainer):
    """``TorchTrainer`` that leaves Ctrl-C alone: ``KeyboardInterrupt`` comes out of ``fit`` at once."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Not Ray Train's handler: it waits until the group has started, and then ends the process with code 0."""


class GroupConfig(TorchConfig):
    """``TorchConfig`` whose gloo ranks talk over the network interface that Ray itself uses."""

    @property
    def backend_cls(self) -> type[_GroupBackend]:
        return _GroupBackend


class _GroupBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Point gloo and NCCL at the interface with this node's address.

    By itself gloo takes what the host name resolves to, and NCCL every interface but loopback's and docker's, those too that do
    not reach the other nodes. Where it is to use several over TCP, ``NCCL_SOCKET_IFNAME`` in the environment says so and stays.
    """
    import psutil

    address = get_node_ip_address()  # type: ignore[no-untyped-call]
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # that very name, not all that begin so


class FinalErrors(UserCallback):
    """Tells the driver of every failure, and ends the run where another start would only fail again."""

    def __init__(self, progress: ActorHandle[Progress]) -> None:
        self._progress = progress
        self._before = ""
        self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the final error: Ray Train takes a failing callback as its own end, without a retry."""
        lost = {rank for rank, error in worker_exceptions.items() if _is_loss(error)}
        if error := final_error(worker_exceptions, lost, self._before):
            raise error
        self._before = describe_failure(worker_exceptions, lost)
        asked = is_asked_for(worker_exceptions, lost)
        self._progress.fail.remote("rank_lost" if lost else "asked" if asked else "error")
        if asked:
            self._progress.say.remote("restart", self._before)
            return
        self._failures += 1
        self._progress.say.remote("failure", self._before)
        if self._failures > MAX_RESTARTS:
            raise TrainingError(
                f"the run failed {self._failures} times; the last time: {self._before}",
                hint="the same command resumes from the newest checkpoint",
            )


def _is_loss(error: Exception) -> bool:
    return isinstance(getattr(error, "health_check_failure", error), RayActorError)
