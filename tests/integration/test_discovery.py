"""Nodes that come and go, as a real Prometheus sees them; and records in a bucket that breaks."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from doctor import need
from fault_proxy import FaultProxy, s3_server, s3_storage
from tiny_runs import free_ports

from outgrow.monitoring.agent.discovery import FOLDER, Directory, Registration
from outgrow.storage import Storage


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def serving(address: str, pages: dict[str, Callable[[], tuple[str, str]]]) -> Iterator[int]:
    """Port of an HTTP server with these pages: kind of content and text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, text = pages[self.path]()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class Prometheus:
    """A Prometheus that asks ``discovery`` for targets each second."""

    def __init__(self, folder: Path, discovery: str) -> None:
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {
                    "job_name": "outgrow",
                    "honor_labels": True,
                    "http_sd_configs": [{"url": discovery, "refresh_interval": "1s"}],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))
        port = free_ports(1)[0]
        self._url = f"http://127.0.0.1:{port}"
        words = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with open(folder / "prometheus.log", "wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", *words, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def targets(self) -> dict[str, tuple[str, str]]:
        """URL and health of what is scraped, by node."""
        found = self._ask("targets")["activeTargets"] if self._is_ready() else []
        return {target["labels"]["node"]: (target["scrapeUrl"], target["health"]) for target in found}

    def query(self, expression: str) -> dict[str, float]:
        """Newest values by node."""
        found = self._ask(f"query?query={expression}")["result"]
        return {sample["metric"]["node"]: float(sample["value"][1]) for sample in found}

    def _is_ready(self) -> bool:
        assert self._process.poll() is None
        try:
            return requests.get(f"{self._url}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False

    def _ask(self, what: str) -> Any:
        return requests.get(f"{self._url}/api/v1/{what}", timeout=5).json()["data"]


def own_address() -> str:
    """An address of this machine that is not loopback."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not one.address.startswith(("127.", "169.254.")):
                return one.address
    pytest.skip("this machine has no address but loopback")


def page(node: str, value: int) -> Callable[[], tuple[str, str]]:
    return lambda: ("text/plain", f'outgrow_agent_runs{{node="{node}"}} {value}\n')


def test_prometheus_follows_nodes_that_come_and_go(tmp_path: Path) -> None:
    need("prometheus")
    storage, address = Storage(str(tmp_path / "storage")), own_address()
    with ExitStack() as stack:
        directories: list[Directory] = []
        pages = {
            "/metrics": page("home", 1),
            "/targets": lambda: ("application/json", json.dumps(directories[0].targets())),
        }
        home = stack.enter_context(serving("127.0.0.1", pages))
        far = stack.enter_context(serving(address, {"/metrics": page("far", 2)}))
        directories.append(Directory(storage, "home", f"http://127.0.0.1:{home}", max_age_s=3.0, cache_s=0.2))
        prometheus = Prometheus(tmp_path, f"http://127.0.0.1:{home}/targets")
        stack.callback(prometheus.close)
        nodes = {
            "far": f"http://{address}:{far}",
            # Behind TLS, and it does not answer: it stays a target that is down, so that an alert can say so.
            "dark": "https://192.0.2.9:9640",
            # What its own node alone reaches.
            "near": "http://127.0.0.1:1",
        }
        registered = {name: Registration(storage, name, url, interval_s=0.3) for name, url in nodes.items()}
        for registration in registered.values():
            registration.start()
        # A record that does not speak for the node that its name is of.
        storage.write_json(f"{FOLDER}/liar.json", {"host": "home", "url": f"http://{address}:{far}", "time": time.time()})
        both = {"home": (f"http://127.0.0.1:{home}/metrics", "up"), "far": (f"http://{address}:{far}/metrics", "up")}
        until(lambda: prometheus.targets().items() >= both.items(), "the nodes that came")
        assert prometheus.targets().keys() == {"home", "far", "dark"}
        assert prometheus.targets()["dark"][0] == "https://192.0.2.9:9640/metrics"
        until(lambda: prometheus.query("outgrow_agent_runs") == {"home": 1, "far": 2}, "what both nodes say")
        assert prometheus.query("up").items() >= {"home": 1, "far": 1}.items()

        # One goes in order, one ends without a word and its record grows old, one comes.
        registered["dark"].withdraw()
        registered["far"].withdraw()
        storage.write_json(f"{FOLDER}/far.json", {"host": "far", "url": nodes["far"], "time": time.time() - 1000})
        late = Registration(storage, "late", f"http://{address}:{far}", interval_s=0.3)
        late.start()
        until(lambda: prometheus.targets().keys() == {"home", "late"}, "those that went are forgotten")
        late.withdraw()
        registered["near"].withdraw()


def test_records_in_a_bucket_that_is_away_for_a_while() -> None:
    with s3_server() as server, FaultProxy(server) as proxy:
        storage = s3_storage(proxy.url)
        nodes = Directory(storage, "home", "http://127.0.0.1:9640", cache_s=0.0)

        def names() -> list[str]:
            return [group["labels"]["node"] for group in nodes.targets()]

        first = Registration(storage, "first", "http://10.0.0.1:9640", interval_s=0.1)
        first.start()
        until(lambda: names() == ["home", "first"], "the first")
        with proxy.absent():
            second = Registration(storage, "second", "http://10.0.0.2:9640", interval_s=0.1)
            second.start()
            begun = time.monotonic()
            assert names() == ["home", "first"], "what was known stays"
            assert time.monotonic() - begun < 2
        until(lambda: names() == ["home", "first", "second"], "a node that came meanwhile")
        first.withdraw()
        second.withdraw()
        until(lambda: names() == ["home"], "both went")
        assert storage.names(FOLDER) == []
