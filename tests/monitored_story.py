"""A monitored run from start to end, with what can happen to one: real commands, real Prometheus, real kills.

What was seen on the way is kept in ``Story``; tests then ask it, and the Prometheus that is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from text_recipes import write_texts
from tiny_runs import ROOT, Place, free_ports, tiny_place, wait_for

from outgrow.monitoring.agent.families import Collector
from outgrow.monitoring.agent.nvml import NvmlSource, RecordedReader
from outgrow.monitoring.agent.server import listen, metrics_route
from outgrow.recipes.schema.monitoring import Access

RECIPE = """
schema: 1
run: {{name: {name}, seed: 3}}
model:
  kind: architecture
  family: llama
  config: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}}
data:
  sequence_length: 128
  tokenizer: {{kind: train, vocab_size: 300}}
  streams: [{{name: words, source: {{kind: text, path: words}}}}]
  validation_fraction: 0.02
  loader_workers: 1
  shard_bytes: 65536
  window_shards: 2
batch: {{rows: 16}}
duration: {{steps: {steps}}}
optimizer: {{learning_rate: 0.003}}
schedule: {{kind: custom, factory: "eventful_schedule:{schedule}", options: {options}}}
precision: fp32
validation: {{every_steps: 40, max_rows: 8, prompts: [alpha]}}
checkpoint: {{every_steps: 20, keep_newest: 2, keep_best: 0}}
logging: {{every_steps: 2}}
"""

SITE = """
schema: 1
storage: storage
cache: cache
workers: 2
threads_per_worker: 1
build_processes: 1
cluster: {{token_file: token}}
tiers:
  - {{name: nvme, path: nvme, reserve: 1 MB, run_cache: 330 kB}}
  - {{name: usb, path: usb, reserve: 0 B}}
  - {{name: home, path: storage, reserve: 1 MB}}
place: {{datasets: [usb]}}
prices: {{gpu_hour: 2}}
device_flops: 5e10
monitoring:
  folder: monitoring
  agent_port: {ports[0]}
  prometheus_port: {ports[1]}
  alertmanager_port: {ports[2]}
  grafana_port: {ports[3]}
  scrape_s: 1
  stall_after_s: 4
  ray_discovery: gpus.json
"""


@dataclass
class Story:
    """The place, and what was seen there."""

    place: Place
    ports: list[int]
    notes: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    # --- the servers ----------------------------------------------------------------------------------------------------

    def metrics(self) -> str:
        return requests.get(f"http://127.0.0.1:{self.ports[0]}/metrics", timeout=10).text

    def runs(self) -> list[dict[str, Any]]:
        try:
            answer = requests.get(f"http://127.0.0.1:{self.ports[0]}/runs", timeout=10)
        except requests.ConnectionError:
            return []
        return list(answer.json())

    def run(self, name: str) -> dict[str, Any] | None:
        return next((run for run in self.runs() if run["facts"]["name"] == name), None)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that the expression gives now. Raises ``AssertionError`` where Prometheus does not understand it."""
        return self._ask("query", query=expression)

    def ever(self, expression: str) -> list[dict[str, Any]]:
        """What the expression gave at any second since the story began."""
        return self._ask("query_range", query=expression, start=self.started, end=time.time(), step="1s")

    def value(self, expression: str) -> float:
        (found,) = self.query(expression)
        return float(found["value"][1])

    def _ask(self, what: str, **parameters: Any) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.ports[1]}/api/v1/{what}"
        answer = requests.get(url, params=parameters, timeout=30).json()
        assert answer["status"] == "success", f"{parameters['query']}: {answer.get('error')}"
        return list(answer["data"]["result"])

    def alerts(self) -> set[str]:
        """Names of the alerts that Alertmanager has now."""
        answer = requests.get(f"http://127.0.0.1:{self.ports[2]}/api/v2/alerts", timeout=10).json()
        return {alert["labels"]["alertname"] for alert in answer}

    # --- what happens ---------------------------------------------------------------------------------------------------

    def write(self, name: str, *, steps: int, schedule: str, **options: float) -> None:
        """Recipe and site of the next run."""
        text = RECIPE.format(name=name, steps=steps, schedule=schedule, options=json.dumps(options))
        (self.place.folder / f"{name}.yaml").write_text(text)
        (self.place.folder / "site.yaml").write_text(SITE.format(ports=self.ports))

    def pid(self, name: str, rank: int) -> int:
        """The process of a rank of the newest start of a run."""
        found = self.run(name)
        assert found is not None
        return int(found["ranks"][str(rank)]["record"]["pid"])

    def loader_worker(self, name: str, rank: int) -> int:
        """The process that reads ahead for a rank."""
        children = psutil.Process(self.pid(name, rank)).children()
        (found,) = [child.pid for child in children if "read_ahead" in " ".join(child.cmdline())]
        return found

    def step(self, name: str) -> int:
        found = self.run(name)
        rank = found["ranks"].get("0") if found else None
        return int(rank["record"]["step"] or 0) if rank else 0

    def state(self, name: str) -> str:
        found = self.run(name)
        return str(found["state"]) if found else ""

    def wait(self, reached: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        wait_for(reached, what, self.place.log, timeout_s=timeout_s)

    def processes(self) -> dict[str, int]:
        """Pids of what ``monitor up`` has started, by name."""
        parts = json.loads(next((self.place.folder / "monitoring").glob("*/stack/processes.json")).read_text())
        return {name: int(part["pid"]) for name, part in parts.items()}

    def end_ray(self) -> None:
        """What is left of the embedded cluster of a driver that was killed."""
        servers = set(self.processes().values())
        for process in self.place.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in servers and "ray" in " ".join(process.cmdline()):
                    process.kill()


@contextmanager
def story(folder: Path) -> Iterator[Story]:
    """A place with a dataset of some 10 shards and everything of ``monitor up`` running; all of it is ended on the way out."""
    ports = free_ports(4)
    with tiny_place(folder, site=SITE.format(ports=ports)) as place:
        told = Story(place=place, ports=ports)
        for number in range(2):
            write_texts(folder / f"words/{number}", 100, num_words=240)
        told.write("main", steps=2000, schedule="eventful", seconds=0.05)
        place.run("monitor", "up", timeout_s=60)
        try:
            yield told
        finally:
            subprocess.run(
                ["outgrow", "monitor", "down"], cwd=folder, env=place.environment, timeout=60, capture_output=True, check=False
            )


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, how)


def is_there(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@contextmanager
def nvml_agent(scene: Story) -> Iterator[None]:
    """A node with GPUs, as far as NVML goes: recorded values through the very reader, source and server of an agent.

    Prometheus finds it as it finds Ray's own targets.
    """
    reader = RecordedReader(ROOT / "tests/files/nvml_snapshot.json")
    collector = Collector("gpu-box", list, [NvmlSource(reader, "gpu-box")])
    server = listen("127.0.0.1", free_ports(1)[0], Access(), {"/metrics": metrics_route(collector)})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    target = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_address[1]}"]}]
    (scene.place.folder / "gpus.json").write_text(json.dumps(target))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def damage_copies(tier: Path) -> None:
    """Flip a byte in the middle of every shard of a tier's whole copy."""
    for path in sorted(tier.rglob("shard.*.mds")):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
