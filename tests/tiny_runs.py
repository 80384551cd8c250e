"""Real ``outgrow`` commands on a tiny recipe, each in a place of its own, and all that they started ended with it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
from text_recipes import write_texts

from outgrow.contracts import StepRecord
from outgrow.monitoring.events import read_events
from outgrow.storage import Storage

ROOT = Path(__file__).parents[1]

RECIPE = """
schema: 1
run: {name: tiny, seed: 3}
model:
  kind: architecture
  family: llama
  config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}
data:
  sequence_length: 32
  tokenizer: {kind: train, vocab_size: 300}
  streams: [{name: words, source: {kind: text, path: words}}]
  validation_fraction: 0.1
  loader_workers: 0
batch: {rows: 5}
duration: {steps: 50}
optimizer: {learning_rate: 0.003}
# It sleeps, so that there is time to kill a run half-way.
schedule: {kind: custom, factory: "slow_schedule:constant", options: {seconds: 0.1}}
precision: fp32
validation: {every_steps: 20, max_rows: 8}
checkpoint: {every_steps: 10}
logging: {every_steps: 1}
"""

SITE = """
schema: 1
storage: storage
cache: cache
workers: 2
threads_per_worker: 1
build_processes: 1
cluster: {token_file: token}
monitoring: {agent: false, folder: monitoring}
"""


@dataclass(frozen=True)
class Place:
    """A folder with recipe, site and text, and the environment of the commands that run there.

    ``inside`` comes before every command: ``ip netns exec`` of a network namespace, say.
    """

    folder: Path
    environment: dict[str, str]
    inside: tuple[str, ...] = ()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A command of ``outgrow`` in the background; what it says goes to ``log`` in the folder."""
        return self.start_program("log", sys.executable, "-m", "outgrow", *words)

    def start_program(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        with open(self.folder / log, "wb") as file:
            return subprocess.Popen([*self.inside, *words], cwd=self.folder, env=self.environment, stdout=file, stderr=file)

    def run(self, *words: str, timeout_s: float = 150) -> str:
        """What a command of ``outgrow`` says, once it has ended well."""
        code = self.start(*words).wait(timeout_s)
        assert code == 0, f"exit code {code}\n{self.log()}"
        return self.log()

    def run_beside(self, *words: str, timeout_s: float = 60) -> str:
        """What a command says that runs beside the one of ``start``, once it has ended well."""
        words = (*self.inside, sys.executable, "-m", "outgrow", *words)
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout.decode()}"
        return done.stdout.decode()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def records(self) -> list[StepRecord]:
        """Every record of the one run in the place."""
        storage = Storage(str(self.folder / "storage"))
        return [record for run in storage.names("runs") for record in read_events(storage, f"runs/{run}")]

    def wait_for_step(self, step: int, command: subprocess.Popen[bytes], *, starts: int = 1) -> None:
        """Returns once ``command`` has shown ``step`` after it has shown that the ranks were started ``starts`` times."""

        def reached() -> bool:
            assert command.poll() is None, f"ended with exit code {command.returncode}\n{self.log()}"
            *before, last = re.split(r"(?:started|resumed) on \d+ rank", self.log())
            steps = [int(number) for number in re.findall(r"^step (\d+)/", last, re.MULTILINE)]
            return len(before) >= starts and max(steps, default=0) >= step

        wait_for(reached, f"step {step}", self.log)

    def processes(self) -> list[psutil.Process]:
        """What was started here and lives: all of it has inherited this place's folder of Ray."""
        mine = self.environment["RAY_TMPDIR"]
        return [process for process in psutil.process_iter() if _variable(process, "RAY_TMPDIR") == mine]

    def kill_everything(self) -> None:
        """As a power cut does."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(processes, timeout=5)


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(name)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


@contextmanager
def tiny_place(folder: Path, *, site: str = SITE, **environment: str) -> Iterator[Place]:
    """A place in ``folder``; leaving it kills what still runs there."""
    write_texts(folder / "words", 40)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "site.yaml").write_text(site)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray's sockets lie below its folder, and the name of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="og-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        paths = {
            "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}",
            "PYTHONPATH": str(ROOT / "tests"),
            "RAY_TMPDIR": ray_folder,
        }
        place = Place(folder, inherited | paths | environment)
        try:
            yield place
        finally:
            place.kill_everything()


@contextmanager
def head(place: Place) -> Iterator[str]:
    """A Ray head with token authentication, started as a user does, in ``place``; gives the address of its job server."""
    (place.folder / "token").write_text(secrets.token_hex(32))
    port, dashboard, agent = free_ports(3)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    words = ["--head", "--block", *ports, "--num-cpus=2", "--disable-usage-stats"]
    with open(place.folder / "head.log", "wb") as log:
        started = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *words, "--object-store-memory=100000000"],
            cwd=place.folder,
            env=place.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place.folder / "token")},
            stdout=log,
            stderr=log,
        )
    said = (place.folder / "head.log").read_text
    address = f"http://127.0.0.1:{dashboard}"
    # It leaves its address for others last of all.
    left = Path(place.environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
    wait_for(lambda: started.poll() is not None or (left.exists() and _answers(address)), "job server", said)
    assert started.poll() is None, said()
    yield address
    place.kill_everything()
    started.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, outside those that Ray gives to its workers."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            port = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            if not 10002 <= port <= 19999:
                found.append(port)
        return found


def _answers(address: str) -> bool:
    """Whether the job server is there; without a token it refuses, but it speaks."""
    try:
        return requests.get(f"{address}/api/version", timeout=5).status_code == 401
    except requests.ConnectionError:
        return False


def wait_for(reached: Callable[[], bool], what: str, log: Callable[[], str], timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s\n{log()}"
        time.sleep(0.1)
