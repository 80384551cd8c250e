"""Two nodes without a shared folder, each in a network namespace of its own; what they share is a bucket.

The second node has no checkout, just the installed wheel, and in the place of the first node's folder it sees an empty one.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny_runs import ROOT, Place, tiny_place, wait_for

pytestmark = pytest.mark.cluster

RAY = str(Path(sys.executable).with_name("ray"))
FOLDERS = ("cluster", "monitoring", "recipes", "streaming", "trainers")
FIRST, SECOND = "10.77.0.1", "10.77.0.2"
ENDPOINT = f"http://{FIRST}:5000"

SITE = f"""
schema: 1
storage: s3://runs/here
storage_options: {{key: "${{env:STORE_KEY}}", secret: "${{env:STORE_SECRET}}", endpoint_url: "{ENDPOINT}"}}
cache: cache
workers: 2
threads_per_worker: 1
build_processes: 1
monitoring: {{agent: false, folder: monitoring}}
"""


@dataclass(frozen=True)
class TwoNodes:
    first: Place
    second: Place
    node: subprocess.Popen[bytes]
    """The ``ray start`` of the second node; its view of the files is under /proc/PID/root."""

    def seen_by_second(self, folder: Path) -> Path:
        return Path(f"/proc/{self.node.pid}/root{folder}")

    def python(self, code: str) -> str:
        """What a program in the first node prints, with the bucket at hand as ``fs``."""
        options = f"key='{self.first.environment['STORE_KEY']}', secret='x', endpoint_url='{ENDPOINT}'"
        program = f"import s3fs, json\nfs = s3fs.S3FileSystem({options})\n{code}"
        done = subprocess.run(
            [*self.first.inside, sys.executable, "-c", program], env=self.first.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def missing() -> str:
    """Why two nodes cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    return f"missing: {', '.join(absent)}" if absent else ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel of this checkout is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "__pycache__", "shared")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    words = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run([*pip, *words], check=True)
    (built,) = folder.glob("outgrow-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(built)], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def two_nodes(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    if why := missing():
        if os.environ.get("REQUIRE_ALL"):
            pytest.fail(why)
        pytest.skip(why)
    store = {"STORE_KEY": "key", "STORE_SECRET": secrets.token_hex(16)}
    with ExitStack() as until_end:
        first = until_end.enter_context(tiny_place(tmp_path_factory.mktemp("first"), site=SITE, **store))
        second = until_end.enter_context(tiny_place(tmp_path_factory.mktemp("second")))
        one, two = f"og{os.getpid()}a", f"og{os.getpid()}b"
        for name in (one, two):
            subprocess.run(["ip", "netns", "add", name], check=True)
            until_end.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
        for name, address in ((one, FIRST), (two, SECOND)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        first = replace(with_token(first), inside=("ip", "netns", "exec", one))
        second = replace(with_token(second, first), inside=("ip", "netns", "exec", two))
        yield start_both(first, second, wheel, until_end)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def with_token(place: Place, giver: Place | None = None) -> Place:
    path = place.folder / "token"
    path.write_text((giver.folder / "token").read_text() if giver else secrets.token_hex(32))
    path.chmod(0o600)
    return replace(place, environment=place.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})


def start_both(first: Place, second: Place, wheel: Path, until_end: ExitStack) -> TwoNodes:
    ray = [RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
    head = ["--head", f"--node-ip-address={FIRST}", "--port=6379", "--include-dashboard=false"]
    hidden = [first.folder, ROOT / "src", *(ROOT / name for name in FOLDERS)]
    mounts = " && ".join(f"mount -t tmpfs none {shlex.quote(str(folder))}" for folder in hidden)
    join = shlex.join([*ray, f"--address={FIRST}:6379", f"--node-ip-address={SECOND}"])
    moto = first.start_program("moto.log", sys.executable, "-m", "moto.server", "-H", FIRST, "-p", "5000")
    here = first.start_program("head.log", *ray, *head)
    alone = replace(second, environment=second.environment | {"PYTHONPATH": f"{wheel}:{second.environment['PYTHONPATH']}"})
    left = Path(first.environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
    wait_for(left.exists, "head", (first.folder / "head.log").read_text)
    there = alone.start_program("node.log", "unshare", "-m", "sh", "-c", f"{mounts} && exec {join}")
    for started in (moto, here, there):
        until_end.callback(started.wait)
    until_end.callback(second.kill_everything)
    until_end.callback(first.kill_everything)
    nodes = TwoNodes(first, second, there)
    joined = second.folder / "node.log"
    wait_for(lambda: "Ray runtime started" in joined.read_text(), "second node", joined.read_text)
    nodes.python("fs.mkdir('runs')")
    return nodes


def test_a_run_on_two_nodes_trains_saves_into_one_bucket_and_resumes(two_nodes: TwoNodes) -> None:
    first = two_nodes.first
    quick = ["schedule.options.seconds=0", "checkpoint.every_steps=6"]

    said = first.run("train", "recipe.yaml", *quick, "duration.steps=6")
    assert "2 node(s), 2 CPUs, 0 GPUs" in said
    assert "started on 2 rank(s)" in said
    assert "step 6/6  finished" in said

    # The second node trained: it has fetched the dataset into a cache of its own, and sees nothing of the first's.
    cache = two_nodes.seen_by_second(first.folder) / "cache"
    assert list(cache.rglob("*.mds")), "no shard has reached the second node"
    assert not (two_nodes.seen_by_second(first.folder) / "recipe.yaml").exists()
    assert not list(two_nodes.seen_by_second(ROOT / "src").iterdir())

    names = json.loads(two_nodes.python("print(json.dumps(fs.find('runs/here/runs')))"))
    (checkpoint,) = {name.rsplit("/", 1)[0] for name in names if name.endswith("COMMITTED")}
    assert checkpoint.endswith("step-00000006")
    from_ranks = {name.rsplit("/", 1)[1] for name in names if name.startswith(f"{checkpoint}/rank-")}
    assert from_ranks == {"rank-00000.safetensors", "rank-00001.safetensors"}

    said = first.run("train", "recipe.yaml", *quick, "duration.steps=9")
    assert "resumed on 2 rank(s)" in said
    assert "step 7/9" in said
    assert "step 6/9  loss" not in said
    assert "step 9/9  finished" in said
    assert first.environment["STORE_SECRET"] not in said


def test_no_secret_of_the_storage_is_left_with_ray(two_nodes: TwoNodes) -> None:
    secret = two_nodes.first.environment["STORE_SECRET"].encode()
    for place in (two_nodes.first, two_nodes.second):
        folder = Path(place.environment["RAY_TMPDIR"])
        assert [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()] == []
