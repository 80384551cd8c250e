"""The node agent as a real process: who may kill it, what it says of ranks that are killed and stopped, when it ends."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from monitor_sites import write_certificate, write_password
from recorded_ranks import site_at, start_rank, started
from tiny_runs import free_ports, tiny_place, wait_for

from outgrow.errors import MonitorError, SiteError
from outgrow.monitoring.agent.lookout import Lookout
from outgrow.monitoring.agent.server import listen
from outgrow.monitoring.agent.start import FILE, LOCK, Running, end_agent, ensure_agent, find_agent, keep_agent, start_agent
from outgrow.monitoring.recording.attempt import node_folder, records_folder
from outgrow.recipes.schema.monitoring import Access
from outgrow.recipes.schema.site import Site

PROGRAMS = str(Path(__file__).parents[1] / "ray_programs.py")
SECRET = "never-to-be-seen-3141"

_STARTER = """
import json, sys, time
from outgrow.monitoring.agent.start import ensure_agent
from outgrow.recipes.schema.site import Site
print(ensure_agent(Site.model_validate(json.load(sys.stdin))), flush=True)
time.sleep(60)
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = site_at(tmp_path, free_ports(1)[0])
    yield found
    end_agent(node_folder(found))


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[bytes]]]:
    started_here: list[subprocess.Popen[bytes]] = []
    yield started_here
    for process in started_here:
        process.kill()
        process.wait()


def agent_of(site: Site) -> Running:
    wait_for(lambda: find_agent(node_folder(site)) is not None, "agent", lambda: log_of(site), timeout_s=20)
    running = find_agent(node_folder(site))
    assert running is not None
    return running


def log_of(site: Site) -> str:
    path = node_folder(site) / "agent.log"
    return path.read_text() if path.exists() else "(no log)"


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def runs_of(running: Running) -> dict[str, Any]:
    return {run["facts"]["run"]: run for run in json.loads(get(f"{running.url}/runs"))}


def within(patience_s: float, wanted: Callable[[], bool], what: str) -> float:
    """Seconds until ``wanted``."""
    begun = time.monotonic()
    while not wanted():
        assert time.monotonic() - begun < patience_s, f"no {what} within {patience_s} s"
        time.sleep(0.02)
    return time.monotonic() - begun


# --- start ------------------------------------------------------------------------------------------------------------


def test_it_outlives_its_starter_and_holds_nothing_of_it(site: Site) -> None:
    secret = site.model_copy(update={"storage_options": {"auto_mkdir": True, "secret_key": SECRET}})
    starter = subprocess.Popen(
        [sys.executable, "-c", _STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "RAY_JOB_ID": "01"},
        start_new_session=True,
    )
    assert starter.stdin and starter.stdout
    starter.stdin.write(json.dumps(secret.to_dict()).encode())
    starter.stdin.close()
    assert starter.stdout.readline().startswith(b"node agent started")
    os.killpg(starter.pid, signal.SIGKILL)  # at once: it may not even have begun to run
    starter.wait()
    assert starter.stdout.read() == b"", "the end of the starter's output is seen: nobody else holds it open"
    starter.stdout.close()
    running = agent_of(site)
    assert get(f"{running.url}/health") == "ok\n"
    process = psutil.Process(running.pid)
    assert process.cwd() == "/"
    assert os.getsid(running.pid) != running.pid or process.ppid() != os.getpid()
    assert "RAY_JOB_ID" not in process.environ()
    for text in (" ".join(process.cmdline()), json.dumps(process.environ())):
        assert SECRET not in text
    for path in node_folder(site).parents[1].rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.monitoring
def test_it_outlives_a_worker_of_ray_and_the_cluster(site: Site, tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text(json.dumps(site.to_dict()))
    (tmp_path / "place").mkdir()
    words = [sys.executable, PROGRAMS, "1", json.dumps({"agent": [str(tmp_path / "site.json")]})]
    with tiny_place(tmp_path / "place") as place:
        program = place.start_program("log", *words)
        assert program.wait(120) == 0, place.log()
        assert json.loads(place.log().splitlines()[-1])["agent"].startswith("node agent started")
    time.sleep(2)
    assert get(f"{agent_of(site).url}/health") == "ok\n"


def test_a_killed_agent_is_followed_by_another(site: Site) -> None:
    ensure_agent(site)
    first = agent_of(site)
    begun = time.perf_counter()
    said = ensure_agent(site)
    assert time.perf_counter() - begun < 0.05
    assert said == f"node agent at {first.url}"
    with closing(Lookout(site, every_s=0.1)):  # what a run has
        os.kill(first.pid, signal.SIGKILL)
        within(5, lambda: not first.is_alive, "death")
        second = agent_of(site)
        assert second.pid != first.pid
        assert get(f"{second.url}/health") == "ok\n"
        time.sleep(0.5)
        assert find_agent(node_folder(site)) == second, "a living one is left alone"


def test_only_one_of_many_serves(site: Site) -> None:
    for _ in range(3):
        os.close(start_agent(site, keep=False))
    running = agent_of(site)

    def others() -> list[psutil.Process]:
        mine = [one for one in psutil.process_iter(["cmdline", "environ"]) if one.info["cmdline"] and _is_ours(one, site)]
        return [one for one in mine if one.pid != running.pid]

    within(20, lambda: not others(), "end of the others")
    assert find_agent(node_folder(site)) == running
    assert log_of(site).count("has an agent already") == 2


def _is_ours(process: psutil.Process, site: Site) -> bool:
    """Agents are told apart by the log that they write to."""
    try:
        return any(one.path.startswith(str(node_folder(site))) for one in process.open_files())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_a_port_that_is_taken_is_passed_over(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.monitoring.agent_port)):
        ensure_agent(site)
        running = agent_of(site)
        assert site.monitoring.agent_port < running.port <= site.monitoring.agent_port + 20
        assert get(f"{running.url}/health") == "ok\n"
    # It ends where its folder was taken away.
    shutil.rmtree(node_folder(site))
    within(5, lambda: not running.is_alive, "end")
    assert not node_folder(site).exists()


def test_it_never_raises_into_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert ensure_agent(site_at(tmp_path / "file", 9640)).startswith("no node agent: ")
    assert "agent: false" in ensure_agent(site_at(tmp_path / "none", 9640, agent=False))


def test_one_that_is_to_stay_replaces_one_that_is_not(site: Site) -> None:
    ensure_agent(site)
    first = agent_of(site)
    kept = keep_agent(site)
    assert kept.keep and kept.pid != first.pid and not first.is_alive
    assert keep_agent(site) == kept
    assert get(f"{kept.url}/health") == "ok\n"

    # One of another version is replaced by one that stays as well.
    other = kept.to_dict() | {"format": kept.format + 1}
    (node_folder(site) / FILE).write_text(json.dumps(other))
    assert ensure_agent(site).startswith("node agent started")
    within(20, lambda: (found := find_agent(node_folder(site))) is not None and found.pid != kept.pid, "other agent")
    assert not kept.is_alive
    third = agent_of(site)
    assert third.keep
    assert end_agent(node_folder(site)) and not third.is_alive
    assert not (node_folder(site) / FILE).exists()
    assert not end_agent(node_folder(site))


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    far = site_at(tmp_path, free_ports(1)[0], address="203.0.113.7", open=True)  # of nobody
    begun = time.monotonic()
    with pytest.raises(MonitorError, match=r"cannot listen on 203\.0\.113\.7"):
        keep_agent(far)
    assert time.monotonic() - begun < 15


# --- end --------------------------------------------------------------------------------------------------------------


def test_it_ends_when_idle_and_stays_while_wanted(tmp_path: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    site = site_at(tmp_path, free_ports(1)[0], idle_s=1.0)
    folder = started(node_folder(site), "run")
    ranks.append(start_rank(folder, 0))
    within(30, (folder / "rank-00000.rec").exists, "record")
    ensure_agent(site)
    running = agent_of(site)
    time.sleep(2.2)
    assert running.is_alive, "a run is going"
    ranks[0].kill()
    ranks[0].wait()
    for _ in range(5):
        time.sleep(0.5)
        ensure_agent(site)
    assert running.is_alive, "somebody has asked for it"
    within(8, lambda: not running.is_alive, "end")
    assert not (node_folder(site) / FILE).exists()


def test_it_survives_what_happens_to_records(site: Site, ranks: list[subprocess.Popen[bytes]]) -> None:
    node = node_folder(site)
    ensure_agent(site)
    running = agent_of(site)
    ranks.append(start_rank(started(node, "run"), 0))
    within(20, lambda: "run" in runs_of(running), "run")
    shutil.rmtree(records_folder(node))
    within(5, lambda: runs_of(running) == {}, "end of the run")
    torn = started(node, "torn")
    (torn / "attempt.json").write_text('{"ru')
    (torn / "rank-00000.rec").write_bytes(b"short")
    (node / FILE).unlink()
    assert runs_of(running) == {}
    assert "outgrow_agent_runs" in get(f"{running.url}/metrics")
    within(5, lambda: find_agent(node) == running, "agent.json once more")


# --- ranks that die and stop ------------------------------------------------------------------------------------------


def test_stopped_ranks_are_stalled_and_killed_ones_lost(site: Site, ranks: list[subprocess.Popen[bytes]]) -> None:
    node = node_folder(site)
    folder = started(node, "run", (0, 1))
    ranks += [start_rank(folder, rank) for rank in (0, 1)]
    ensure_agent(site)
    running = agent_of(site)

    def state() -> str:
        run = runs_of(running)["run"]
        return str(run["state"]) if len(run["ranks"]) == 2 else "not all there"

    within(30, lambda: state() == "running", "ranks")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    found_s = within(3.0, lambda: state() == "stalled", "stalled run")
    assert found_s > 0.5, "not before the threshold of a second"
    stalls = node / "stalls" / "run"
    within(10.0, lambda: len(list(stalls.glob("*-agent/rank-*.txt"))) == 2, "stacks of both ranks")
    [dump] = stalls.iterdir()
    within(10.0, lambda: "train_forever" in (dump / "rank-00001.txt").read_text(), "stack of the stopped rank")
    assert "train_forever" in (dump / "rank-00000.txt").read_text()
    time.sleep(1.5)
    assert len(list(stalls.iterdir())) == 1, "once a stall"
    os.kill(ranks[1].pid, signal.SIGCONT)
    within(3.0, lambda: state() == "running", "running run")

    os.kill(ranks[1].pid, signal.SIGKILL)  # nobody asks for its exit code: it is a zombie from here on
    within(1.0, lambda: state() == "lost", "lost run")
    metrics = get(f"{running.url}/metrics")
    for name, labels, value in (("run_active", "", 1), ("rank_up", 'rank="1",', 0), ("rank_up", 'rank="0",', 1)):
        assert f'outgrow_{name}{{node="{node.name}",{labels}run="run"}} {value}.0' in metrics


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def access(tmp_path: Path) -> dict[str, str]:
    certificate, key = write_certificate(tmp_path, ("127.0.0.1",))
    password = write_password(tmp_path / "password", "pass word")
    return {"certificate": str(certificate), "key": str(key), "user": "me", "password_file": str(password)}


def test_tls_and_password(tmp_path: Path, access: dict[str, str]) -> None:
    site = site_at(tmp_path, free_ports(1)[0], access=access)
    try:
        ensure_agent(site)
        running = agent_of(site)
        assert running.url.startswith("https://")
        trust = ssl.create_default_context(cafile=access["certificate"])

        def status(credentials: str | None) -> int:
            request = urllib.request.Request(f"{running.url}/metrics")
            if credentials is not None:
                request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
            try:
                with urllib.request.urlopen(request, context=trust, timeout=10) as answer:
                    assert b"outgrow_agent_start" in answer.read()
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                error.close()
                return int(error.code)

        # Somebody who connects and says nothing must not keep others out.
        with socket.create_connection(("127.0.0.1", running.port)), socket.create_connection(("127.0.0.1", running.port)):
            assert status("me:pass word") == 200
            assert [status(given) for given in (None, "", "me:", "me:wrong", "other:pass word", "me")] == [401] * 6
    finally:
        end_agent(node_folder(site))


def test_a_password_that_others_can_read_is_refused(access: dict[str, str]) -> None:
    os.chmod(access["password_file"], 0o644)
    with pytest.raises(SiteError, match=r"others may read this file \(mode 0644\)[\s\S]*chmod 600"):
        listen("127.0.0.1", free_ports(1)[0], Access(**access), {})


def test_a_certificate_that_is_none_is_refused(access: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    with pytest.raises(SiteError, match="certificate and key cannot be used"):
        listen("127.0.0.1", free_ports(1)[0], Access(**{**access, "certificate": str(tmp_path / "no.pem")}), {})


# --- in the foreground ------------------------------------------------------------------------------------------------


def test_in_the_foreground(site: Site, tmp_path: Path) -> None:
    """To stay there it takes the place of one that would end when idle."""
    ensure_agent(site)
    of_a_run = agent_of(site)
    (tmp_path / "site.yaml").write_text(json.dumps(site.to_dict()))
    command = [sys.executable, "-m", "outgrow", "monitor", "agent", "--site", str(tmp_path / "site.yaml"), "--keep"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        within(20, lambda: not of_a_run.is_alive, "end of the other")
        running = agent_of(site)
        assert (running.pid, running.keep) == (process.pid, True)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(20)
    assert (code, (node_folder(site) / FILE).exists()) == (0, False), (tmp_path / "log").read_text()


def test_it_waits_for_one_that_is_about_to_end(site: Site) -> None:
    """An agent that is ending cannot be found any more, and still holds the lock."""
    node = node_folder(site)
    node.mkdir(parents=True)
    with open(node / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ensure_agent(site)
        time.sleep(1.5)
        assert find_agent(node) is None
    assert get(f"{agent_of(site).url}/health") == "ok\n"
