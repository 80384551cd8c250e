"""Which Ray cluster a run goes to, and the connection to it.

``locate`` decides without importing Ray: the cluster of the job we run in, the one that the site names, a live head on this
machine, else an embedded cluster. A head is asked over the network first, without a token: a dead one, whose left-over address
would make Ray wait, is known within seconds, and one that answers without a token is refused. ``connect`` then joins or starts
it; an embedded cluster listens on loopback alone and ends with the connection.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from outgrow.cluster.inventory import take_inventory
from outgrow.cluster.ray_environment import apply_environment, driver_environment
from outgrow.cluster.ray_token import make_token, read_token
from outgrow.cluster.restarts import first_line
from outgrow.contracts import Inventory
from outgrow.errors import ClusterError
from outgrow.recipes.schema.site import Cluster

_PROBE_S = 3.0
_SURVEY_S = 60.0
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""outgrow passes no data through Ray's object store; Ray would take a third of the memory by itself."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a run will go: the ``host:port`` of a head, or None for an embedded cluster; ``reason`` is for people."""

    address: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one live node of a cluster offers to Ray."""

    id: str
    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A cluster that this process is connected to."""

    address: str
    embedded: bool
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        cpus, gpus = sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes)
        kind = "an embedded Ray cluster" if self.embedded else f"the Ray cluster at {self.address}"
        return f"{kind}: {len(self.nodes)} node(s), {cpus} CPUs, {gpus} GPUs"


def locate(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> Target:
    """Where a run goes; inside a Ray job always that job's cluster, whatever the site says.

    Raises ``ClusterError`` where the cluster is dead though it was named, lets anybody in, or its token is not here.
    """
    target = _choose(cluster, environment)
    if target.address:
        read_token(cluster.token_file, environment)
    return target


def _choose(cluster: Cluster, environment: Mapping[str, str]) -> Target:
    given = environment.get("RAY_ADDRESS", "")
    if given and ("RAY_JOB_CONFIG_JSON_ENV_VAR" in environment or cluster.address == "auto"):
        return _checked(given, "named by RAY_ADDRESS")
    if cluster.address == "local":
        return Target(address=None, reason="the site asks for one")
    if cluster.address != "auto":
        return _checked(cluster.address, "named by the site")
    left = _local_head(environment)
    if left is None:
        return Target(address=None, reason="no Ray head on this machine")
    if probe(left) == "absent":
        return Target(address=None, reason=f"the head that was at {left} is gone")
    return _checked(left, "the head on this machine")


def _checked(address: str, reason: str) -> Target:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ClusterError(f"'{address}' ({reason}) is not host:port", where="cluster.address")
    state = probe(address)
    if state == "absent":
        raise ClusterError(
            f"no Ray head answers at {address} ({reason})",
            hint="start it, or set cluster.address: local in site.yaml for an embedded one",
        )
    if state == "open":
        raise ClusterError(
            f"the Ray head at {address} ({reason}) lets anybody in: it asks for no token",
            hint="start it with a token: RAY_AUTH_MODE=token ray start --head",
        )
    return Target(address=address, reason=reason)


def _local_head(environment: Mapping[str, str]) -> str | None:
    """The address that ``ray start --head`` left on this machine; its head may be dead by now."""
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text().strip() or None
    except FileNotFoundError:
        return None


def probe(address: str) -> Literal["protected", "open", "absent"]:
    """How the head at ``address`` treats a caller without a token; ``absent`` where none answers within three seconds."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            check_alive(b"", timeout=_PROBE_S)  # an empty message: all fields of the request are optional
        except grpc.RpcError as error:
            return "protected" if error.code() == grpc.StatusCode.UNAUTHENTICATED else "absent"
    return "open"


def announce(target: Target) -> str:
    """One line for a person: where the run goes, and why."""
    place = f"the Ray cluster at {target.address}" if target.address else "an embedded Ray cluster"
    return f"using {place} ({target.reason})"


@contextlib.contextmanager
def connect(target: Target, cluster: Cluster, *, cpus: int, gpus: int) -> Iterator[RayCluster]:
    """Connected to ``target`` inside the ``with``; an embedded cluster of ``cpus`` and ``gpus`` is started and ended.

    On another cluster, leaving ends what this process has started there. Raises ``ClusterError`` where there is no token, the
    wrong one, or this machine is no node of the cluster.
    """
    embedded = target.address is None
    if embedded and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        make_token(Path(cluster.token_file).expanduser())
    read_token(cluster.token_file, os.environ)
    apply_environment(driver_environment(cluster.token_file, embedded=embedded, environment=os.environ))

    import ray

    options: dict[str, Any] = {"address": target.address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if embedded:
        options |= {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        context: Any = ray.init(**options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        if embedded:
            raise ClusterError(f"cannot start an embedded Ray cluster: {first_line(error)}") from error
        raise ClusterError(
            f"cannot join the Ray cluster at {target.address}: {first_line(error)}",
            hint="outgrow train runs on a node of the cluster and with its token; from anywhere else: outgrow submit",
        ) from error
    try:
        yield RayCluster(address=context.address_info["gcs_address"], embedded=embedded, nodes=_nodes())
    finally:
        ray.shutdown()


def _nodes() -> tuple[Node, ...]:
    import ray

    everything: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return tuple(
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in everything
        if node["Alive"]
    )


def survey(cluster: RayCluster, here: Inventory) -> Inventory:
    """What the cluster's nodes have together; cores are those given to Ray, disks those of this machine, ``here``.

    Raises ``ClusterError`` naming a node that cannot say, for want of outgrow.
    """
    cores = sum(node.cpus for node in cluster.nodes)
    if len(cluster.nodes) == 1:
        return replace(here, cores=cores)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(take_inventory)
    places_to_ask = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in cluster.nodes]
    asked = [ask.options(scheduling_strategy=place).remote([]) for place in places_to_ask]
    found: list[Inventory] = []
    for node, answer in zip(cluster.nodes, asked, strict=True):
        try:
            found.append(ray.get(answer, timeout=_SURVEY_S))
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ClusterError(
                f"node {node.name} cannot run outgrow: {_last_line(error)}",
                hint="install outgrow there, the same version as here, in the Python that Ray runs in",
            ) from error
    return replace(
        here,
        hostname=f"{len(found)} nodes",
        cores=cores,
        memory_bytes=sum(node.memory_bytes for node in found),
        gpus=tuple(gpu for node in found for gpu in node.gpus),
        nodes=len(found),
    )


def check_room(nodes: tuple[Node, ...], *, workers: int, threads: int, device: str) -> None:
    """Nothing where ``workers`` ranks find a place. Raises ``ClusterError`` with what there is and the nearest that fits."""
    need = f"{workers} rank(s) of {threads} CPU(s)" + (" and a GPU" if device == "cuda" else "")
    if places(nodes, threads=threads, device=device) >= workers:
        return
    fitting = next((t for t in range(threads - 1, 0, -1) if places(nodes, threads=t, device=device) >= workers), None)
    most = places(nodes, threads=1, device=device)
    raise ClusterError(
        f"{need} do not fit; the cluster has " + ", ".join(f"{n.name}: {n.cpus} CPUs, {n.gpus} GPUs" for n in nodes),
        hint=f"set threads_per_worker: {fitting} in site.yaml" if fitting else f"at most workers: {most} fit",
    )


def places(nodes: tuple[Node, ...], *, threads: int, device: str) -> int:
    """How many ranks of ``threads`` CPUs, and one GPU each on ``cuda``, the nodes can hold."""
    return sum(min(n.cpus // threads, n.gpus) if device == "cuda" else n.cpus // threads for n in nodes)


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
