"""``outgrow monitor up``, ``status`` and ``down`` with the real programs, on folders and ports of their own."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import fake_grafana
import pytest
import yaml
from doctor import need
from monitor_sites import eventually, free_ports, outgrow, site_in, write_certificate, write_password, write_site
from typer.testing import CliRunner

from outgrow.cli import app
from outgrow.monitoring.agent.start import end_agent, ensure_agent, find_agent, start_agent
from outgrow.monitoring.recording.recorder import start_ticks
from outgrow.monitoring.stack.access import client
from outgrow.monitoring.stack.processes import read_started
from outgrow.monitoring.stack.status import status
from outgrow.monitoring.stack.up import down, stack_folder, up
from outgrow.recipes.schema.monitoring import RemoteWrite
from outgrow.recipes.schema.site import Site
from outgrow.recipes.site_loading import load_site

NAMES = ("agent", "prometheus", "alertmanager", "grafana")


@pytest.fixture(autouse=True)
def programs() -> None:
    need("prometheus", "prometheus-alertmanager")


@pytest.fixture
def ended() -> Iterator[list[Site]]:
    """Sites of which nothing runs after the test."""
    sites: list[Site] = []
    yield sites
    for site in reversed(sites):
        down(site)


def rows(table: str) -> dict[str, list[str]]:
    """The parts of a shown table by name: their other columns."""
    found = [re.split(r" {2,}", line) for line in table.splitlines()]
    return {row[0]: row[1:] for row in found if row[0] in NAMES and len(row) > 3}


def states(table: str) -> dict[str, str]:
    return {name: row[0] for name, row in rows(table).items()}


def pids(table: str) -> dict[str, str]:
    return {name: row[2] for name, row in rows(table).items()}


def change(path: Path, **keys: Any) -> None:
    data = yaml.safe_load(path.read_text())
    data["monitoring"] |= keys
    path.write_text(yaml.safe_dump(data))


class Hook:
    """A chat that takes alerts."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/secret"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.close()


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Prometheus of somebody else."""
    (tmp_path / "bystander.yml").touch()
    words = [f"--config.file={tmp_path / 'bystander.yml'}", f"--storage.tsdb.path={tmp_path / 'bystander'}"]
    words.append(f"--web.listen-address=127.0.0.1:{free_ports(9)[-1]}")
    with subprocess.Popen(["prometheus", *words], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.mark.timeout(120)
def test_from_up_to_down(
    tmp_path: Path, ended: list[Site], hook: Hook, bystander: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_site(tmp_path / "site")
    site = load_site(path)
    ended.append(site)
    fake_grafana.install(tmp_path / "bin")
    here = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "GF_AUTH_ANONYMOUS_ENABLED": "true", "HOOK": hook.url}
    for name, value in here.items():
        monkeypatch.setenv(name, value)

    def call(word: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["monitor", word, "--site", str(path)])
        assert done.exit_code == code, done.output
        return done.output

    assert set(states(call("status", code=1)).values()) == {"not started"}
    first = outgrow("monitor", "up", "--site", str(path))  # a process of its own, which ends and leaves them behind
    assert states(first) == dict.fromkeys(NAMES, "started")
    folder = stack_folder(site)
    called = json.loads((folder / "grafana/called.json").read_text())
    assert called["password"] == (folder / "grafana/password").read_text()
    assert called["password"] not in first
    assert str(folder / "grafana/password") in first
    assert not [name for name in called["environment"] if name.startswith("GF_")]

    # A changed key: the one part that it is about, here without a new process. Again: nothing happens.
    change(path, alert_webhook="${env:HOOK}")
    hooked = call("up")
    assert states(hooked) == dict.fromkeys(NAMES, "running") | {"alertmanager": "reloaded"}
    assert pids(hooked) == pids(first)
    tell(site, "OutgrowTest")
    again = call("up")
    assert states(again) == dict.fromkeys(NAMES, "running")
    assert pids(again) == pids(first)

    # Killed: said, and mended, the others left alone.
    os.kill(int(pids(first)["prometheus"]), signal.SIGKILL)
    assert states(call("status", code=1))["prometheus"] == "ended"
    mended = call("up")
    assert states(mended) == dict.fromkeys(NAMES, "running") | {"prometheus": "started"}
    assert {name for name in NAMES if pids(mended)[name] != pids(first)[name]} == {"prometheus"}

    eventually(lambda: status(site).targets)
    eventually(lambda: not any(target.error for target in status(site).targets))
    shown = call("status")
    assert re.search(r"outgrow-agents +up", shown)
    eventually(lambda: hook.told, 20)
    assert hook.told[0]["alerts"][0]["labels"]["alertname"] == "OutgrowTest"

    gone = call("down")
    assert len(gone.splitlines()) == len(NAMES)
    for name in NAMES:
        assert math.isnan(start_ticks(int(pids(mended)[name]))), name
    assert "nothing was running" in call("down")
    assert bystander.poll() is None


def tell(site: Site, alert: str) -> None:
    """An alert, as Prometheus would tell it."""
    body = json.dumps([{"labels": {"alertname": alert}}]).encode()
    url = f"http://127.0.0.1:{site.monitoring.alertmanager_port}/api/v2/alerts"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200


@pytest.mark.monitoring
@pytest.mark.timeout(120)
def test_samples_of_a_rented_node_come_home(tmp_path: Path, ended: list[Site]) -> None:
    """TLS, a password, and remote write, with all that asks and is asked through them."""
    certificate, key = write_certificate(tmp_path, ("127.0.0.1", "home.example"))
    password = str(write_password(tmp_path / "password", "a secret"))
    access = {"certificate": str(certificate), "key": str(key), "user": "me", "password_file": password}
    home = site_in(tmp_path / "home", access=access, receive=True)
    ended.append(home)
    url = f"https://127.0.0.1:{home.monitoring.prometheus_port}/api/v1/write"
    remote = {"url": url, "user": "me", "password_file": password, "certificate": str(certificate)}
    started = {one.name: one.result for one in up(home)}
    assert (started["prometheus"], started["alertmanager"]) == ("started", "started")
    rented = site_in(tmp_path / "rented", remote_write=remote, **ports_beside(home))
    ended.append(rented)
    results = {one.name: one.result for one in up(rented)}
    assert (results["prometheus"], results["alertmanager"]) == ("started", "not needed")

    asked = client(home.monitoring.access)
    for name, one in read_started(stack_folder(home)).items():
        with pytest.raises(OSError, match="401"):
            type(asked)(certificate=asked.certificate).get(one.url + ("/health" if name == "agent" else "/metrics"))

    def samples() -> list[Any]:
        query = f"{url.removesuffix('write')}query?query=outgrow_agent_start_time_seconds"
        return list(asked.get_json(query)["result"])

    found = eventually(lambda: len(samples()) == 2 and samples(), 25)
    origins = {one["metric"].get("origin", "") for one in found}
    assert len(origins) == 2, "one is scraped here, the other came by remote write and says from where"
    (sent,) = [one["metric"] for one in found if "origin" in one["metric"]]
    assert sent["job"] == "outgrow-agents"
    assert sent["node"] == sent["origin"]
    eventually(lambda: not any(target.error for target in status(home).targets))
    behind = eventually(lambda: status(rented).behind_s is not None) and status(rented).behind_s
    assert behind is not None
    assert behind < 10
    for site in (home, rented):
        (told,) = {target.job for target in status(site).targets}
        assert told == "outgrow-agents"


def ports_beside(site: Site) -> dict[str, int]:
    """Free ports while nobody has started to listen on some of the others."""
    names = ("agent_port", "prometheus_port", "alertmanager_port", "grafana_port")
    return {name: int(getattr(site.monitoring, name)) + 100 for name in names}


def test_one_that_dies_is_shown_with_its_last_words(tmp_path: Path, ended: list[Site]) -> None:
    site = site_in(tmp_path)
    ended.append(site)
    (stack_folder(site) / "prometheus/data/wal/00000000").mkdir(parents=True)
    outcomes = {one.name: one for one in up(site)}
    unwanted = outcomes["alertmanager"].pid
    assert outcomes["prometheus"].result == "failed"
    assert "wal" in outcomes["prometheus"].text
    assert outcomes["alertmanager"].result == "started", "the rest runs"
    assert not status(site).is_whole

    # One that the site no longer wants is ended, and not missed.
    sends = RemoteWrite(url="http://127.0.0.1:1/api/v1/write")
    site = site.model_copy(update={"monitoring": site.monitoring.model_copy(update={"remote_write": sends})})
    outcomes = {one.name: one for one in up(site)}
    assert outcomes["prometheus"].result == "started"
    assert math.isnan(start_ticks(unwanted))
    assert {part.name: part.state for part in status(site).parts}["alertmanager"] == "not started"
    assert status(site).is_whole


def test_an_agent_that_would_end_is_made_to_stay_and_one_of_others_is_left_alone(
    tmp_path: Path, ended: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path))
    site = site_in(tmp_path)
    ended.append(site)
    node = stack_folder(site).parent
    ensure_agent(site)
    of_a_run = eventually(lambda: find_agent(node))
    assert not of_a_run.keep
    outcomes = {one.name: one for one in up(site)}
    assert {name: one.result for name, one in outcomes.items()} == dict.fromkeys(NAMES, "missing") | {"agent": "started"}
    kept = find_agent(node)
    assert kept is not None
    assert kept.keep
    assert kept.pid not in (of_a_run.pid, None)
    assert outcomes["agent"].pid == kept.pid
    assert [name for name, _ in down(site)] == ["agent"]
    assert find_agent(node) is None

    start_agent(site, keep=True)
    of_others = eventually(lambda: find_agent(node))
    assert {one.name: one.result for one in up(site)}["agent"] == "running"
    assert down(site) == []
    assert find_agent(node) == of_others
    end_agent(node)
