"""Where a run goes: which cluster is chosen, which is refused, and what fits on it. No Ray runs here."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from outgrow.cluster.ray_cluster import Node, announce, check_room, locate, places, probe
from outgrow.cluster.ray_environment import driver_environment
from outgrow.cluster.ray_token import make_token, read_token
from outgrow.cluster.ray_worker import unlike_versions
from outgrow.errors import ClusterError
from outgrow.recipes.schema.site import Cluster

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


@pytest.fixture
def dead_address() -> str:
    """An address that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def serve(status: grpc.StatusCode) -> tuple[grpc.Server, str]:
    """A head's answer to a caller without a token, over the real protocol."""

    def check_alive(request: bytes, context: grpc.ServicerContext) -> bytes:
        if status is not grpc.StatusCode.OK:
            context.abort(status, "InvalidAuthToken")
        return b""

    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"CheckAlive": grpc.unary_unary_rpc_method_handler(check_alive)}
    )
    server = grpc.server(ThreadPoolExecutor(max_workers=1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
def open_head() -> Iterator[str]:
    server, address = serve(grpc.StatusCode.OK)
    yield address
    server.stop(None).wait()


@pytest.fixture
def closed_head() -> Iterator[str]:
    server, address = serve(grpc.StatusCode.UNAUTHENTICATED)
    yield address
    server.stop(None).wait()


def left_by_a_head(folder: Path, address: str) -> dict[str, str]:
    """The environment of a machine where ``ray start --head`` left this address."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)
    return {"RAY_TMPDIR": str(folder), "RAY_AUTH_TOKEN": "known"}


def test_a_head_is_probed_without_a_token(dead_address: str, open_head: str, closed_head: str) -> None:
    assert [probe(address) for address in (dead_address, open_head, closed_head)] == ["absent", "open", "protected"]


def test_without_a_head_a_cluster_is_embedded(tmp_path: Path) -> None:
    target = locate(Cluster(), {"RAY_TMPDIR": str(tmp_path)})
    assert announce(target) == "using an embedded Ray cluster (no Ray head on this machine)"


def test_a_live_head_on_this_machine_is_joined(tmp_path: Path, closed_head: str) -> None:
    target = locate(Cluster(), left_by_a_head(tmp_path, closed_head))
    assert announce(target) == f"using the Ray cluster at {closed_head} (the head on this machine)"


def test_the_address_of_a_dead_head_is_not_waited_for(tmp_path: Path, dead_address: str) -> None:
    target = locate(Cluster(), left_by_a_head(tmp_path, dead_address))
    assert (target.address, target.reason) == (None, f"the head that was at {dead_address} is gone")


def test_a_head_that_lets_anybody_in_is_refused(tmp_path: Path, open_head: str) -> None:
    with pytest.raises(ClusterError, match="lets anybody in") as raised:
        locate(Cluster(), left_by_a_head(tmp_path, open_head))
    assert raised.value.hint == "start it with a token: RAY_AUTH_MODE=token ray start --head"


def test_local_never_joins(tmp_path: Path, closed_head: str) -> None:
    assert locate(Cluster(address="local"), left_by_a_head(tmp_path, closed_head)).address is None


def test_a_head_whose_token_is_not_here_is_refused_at_once(tmp_path: Path, closed_head: str) -> None:
    with pytest.raises(ClusterError, match=f"no token in {tmp_path}/token"):
        locate(Cluster(address=closed_head, token_file=str(tmp_path / "token")), {})


def test_a_named_head_must_answer(dead_address: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray head answers at {dead_address}"):
        locate(Cluster(address=dead_address), {})


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265", "head", "head:"])
def test_a_named_head_is_host_and_port(address: str) -> None:
    with pytest.raises(ClusterError, match="is not host:port"):
        locate(Cluster(address=address), {})


def test_inside_a_job_the_run_stays_on_the_jobs_cluster(closed_head: str) -> None:
    job = {"RAY_ADDRESS": closed_head, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_AUTH_TOKEN": "known"}
    assert locate(Cluster(address="local"), job).address == closed_head
    assert locate(Cluster(address="local"), {"RAY_ADDRESS": closed_head}).address is None


# --- the token --------------------------------------------------------------------------------------------------------


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    assert make_token(path)
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not make_token(path)
    assert path.read_text() == token


def test_a_token_that_others_can_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("as Ray itself leaves it")
    path.chmod(0o644)
    make_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_token_is_the_one_that_ray_will_use(tmp_path: Path) -> None:
    for name in ("site", "env"):
        (tmp_path / name).write_text(f"{name}\n")
    site = str(tmp_path / "site")
    assert read_token(site, {}) == "site"
    assert read_token(site, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "env")}) == "env"
    assert read_token(site, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "env"), "RAY_AUTH_TOKEN": "direct"}) == "direct"


@pytest.mark.parametrize("content", [None, " \n"])
def test_no_token_is_refused_with_the_place_it_belongs(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ClusterError, match=f"no token in {path}"):
        read_token(str(path), {})


def test_the_environment_holds_no_token_and_leaves_that_of_a_job_alone() -> None:
    mine = driver_environment("~/token", embedded=True, environment={})
    assert mine["RAY_AUTH_TOKEN_PATH"] == os.path.expanduser("~/token")
    job = driver_environment("~/token", embedded=False, environment={"RAY_AUTH_TOKEN": "secret"})
    assert "RAY_AUTH_TOKEN_PATH" not in job
    assert "secret" not in job.values()
    assert mine["RAY_AUTH_MODE"] == job["RAY_AUTH_MODE"] == "token"


# --- room -------------------------------------------------------------------------------------------------------------


def node(cpus: int, gpus: int = 0) -> Node:
    return Node(id="", name=f"n{cpus}", cpus=cpus, gpus=gpus)


def test_ranks_are_counted_node_by_node() -> None:
    assert places((node(3), node(3)), threads=2, device="cpu") == 2
    assert places((node(8, 1), node(2, 4)), threads=1, device="cuda") == 3


def test_a_rank_does_not_spread_over_nodes() -> None:
    with pytest.raises(ClusterError) as raised:
        check_room((node(3), node(3)), workers=3, threads=2, device="cpu")
    assert str(raised.value) == (
        "3 rank(s) of 2 CPU(s) do not fit; the cluster has n3: 3 CPUs, 0 GPUs, n3: 3 CPUs, 0 GPUs\n"
        "  set threads_per_worker: 1 in site.yaml"
    )
    check_room((node(3), node(3)), workers=3, threads=1, device="cpu")


def test_more_ranks_than_places_names_how_many_fit() -> None:
    with pytest.raises(ClusterError, match="at most workers: 2 fit"):
        check_room((node(8, 2),), workers=3, threads=1, device="cuda")


# --- versions ---------------------------------------------------------------------------------------------------------


def test_equal_versions_pass() -> None:
    assert unlike_versions([("a", {"torch": "2.13"}), ("b", {"torch": "2.13"})]) == []


def test_a_node_with_another_version_is_named_once() -> None:
    other = ("b", {"python": "3.12.1", "torch": "2.13"})
    ranks = [("a", {"python": "3.11.7", "torch": "2.13"}), other, other]
    assert unlike_versions(ranks) == ["b has python 3.12.1, a has 3.11.7"]
