"""Finding, starting and ending programs: the right one, detached, and never somebody else's."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from monitor_sites import eventually, free_ports, site_in

from outgrow.errors import SiteError
from outgrow.monitoring.recording.recorder import start_ticks
from outgrow.monitoring.stack import installed
from outgrow.monitoring.stack.ports import check_port
from outgrow.monitoring.stack.processes import (
    Started,
    end,
    environment,
    is_process,
    last_lines,
    locked,
    log_path,
    read_started,
    signal_process,
    start,
    write_started,
)
from outgrow.monitoring.stack.status import behind_s
from outgrow.monitoring.stack.up import down, stack_folder, up


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a PATH that have nothing; the folder of that PATH."""
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


# --- what is installed ------------------------------------------------------------------------------------------------


def test_programs_are_found_under_either_name_with_their_version(bare: Path) -> None:
    assert installed.find_all() == {}
    program(bare / "prometheus", "echo 'prometheus, version 2.42.0+ds (branch: debian/sid, revision: 2.42.0+ds-5)'")
    program(bare / "alertmanager", "echo 'alertmanager, version 0.27.0 (branch: HEAD)'")
    program(bare / "grafana-server", "echo 'Version 10.2.3 (commit: 1e84fede, branch: HEAD)'")
    found = installed.find_all()
    assert {name: one.version for name, one in found.items()} == {
        "prometheus": "2.42.0+ds",
        "alertmanager": "0.27.0",
        "grafana": "10.2.3",
    }
    program(bare / "prometheus-alertmanager", "echo 'alertmanager, version 0.25.0'")
    assert installed.find_all()["alertmanager"].path.name == "prometheus-alertmanager"


def test_the_newest_unpacked_release_is_taken(bare: Path) -> None:
    opt = bare.parent / "home/.local/opt"
    for version in ("2.9.1", "2.53.4", "2.46.0"):
        program(opt / f"prometheus-{version}.linux-amd64/prometheus", f"echo prometheus, version {version}")
    program(opt / "grafana-v12.0.2/bin/grafana", "echo grafana version 12.0.2")
    found = installed.find_all()
    assert found["prometheus"].version == "2.53.4"
    assert found["grafana"].path == opt / "grafana-v12.0.2/bin/grafana"


def test_one_that_is_too_old_is_named_with_what_to_do(bare: Path) -> None:
    program(bare / "prometheus", "echo 'prometheus, version 2.24.1+ds'")
    assert installed.find_all() == {}
    text = installed.absence("prometheus")
    assert "2.24.1" in text
    assert "2.32 or later" in text
    assert "outgrow monitor compose" in text
    assert "not installed" in installed.absence("grafana")


def test_one_that_says_no_version_is_tried(bare: Path) -> None:
    program(bare / "grafana-server", "exit 1")
    assert installed.find_all()["grafana"].version == ""


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ended() -> Iterator[list[tuple[int, float]]]:
    """Processes that are no longer there after the test."""
    found: list[tuple[int, float]] = []
    yield found
    end(found, 0.1)


def test_a_started_process_is_detached_and_knows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[tuple[int, float]]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("GF_SECURITY_ADMIN_PASSWORD", "admin")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    log = tmp_path / "part/log"
    one = start([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], log)
    ended.append(one)
    os.close(write)
    assert os.read(read, 1) == b"", "it holds what its starter had open"
    os.close(read)
    eventually(lambda: log.read_text() == "here\n")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    pid = one[0]
    assert os.getsid(pid) != os.getsid(0)
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert b"GF_SECURITY" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_program_needs_little_of_our_environment() -> None:
    ours = {"PATH": "/bin", "LC_ALL": "C", "https_proxy": "http://p", "RAY_AUTH_TOKEN": "x", "PYTHONPATH": "/y"}
    assert set(environment(ours)) == {"PATH", "LC_ALL", "https_proxy"}


def test_one_that_does_not_start_leaves_its_reason_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of before\n")
    since = log.stat().st_size
    one = start([str(tmp_path / "nothing")], log)
    eventually(lambda: not is_process(*one))
    assert "nothing" in eventually(lambda: last_lines(log, since))[-1]
    assert "of before" not in "\n".join(last_lines(log, since))


def test_the_end_is_asked_for_first_and_then_forced(tmp_path: Path, ended: list[tuple[int, float]]) -> None:
    ready = "print('ready', flush=True); time.sleep(60)"
    stubborn = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {ready}"
    both = [
        start([sys.executable, "-c", code], tmp_path / f"{n}/log") for n, code in enumerate((stubborn, "import time; " + ready))
    ]
    ended += both
    eventually(lambda: all((tmp_path / f"{n}/log").read_text() for n in range(2)))
    before = time.monotonic()
    end(both, 0.5)
    assert 0.5 <= time.monotonic() - before < 5
    assert not [one for one in both if is_process(*one)]


def test_another_process_with_the_pid_of_one_that_is_gone_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        other_start = start_ticks(other.pid)
        signal_process(other.pid, other_start - 1, signal.SIGKILL)
        signal_process(other.pid, math.nan, signal.SIGKILL)
        end([(other.pid, other_start - 1)], 0.1)
        assert other.poll() is None
        assert is_process(other.pid, other_start)
        other.kill()


def test_what_was_started_survives_on_disk_and_nonsense_is_nothing(tmp_path: Path) -> None:
    one = Started(pid=3, pid_start=4.0, started=5.0, url="http://x", version="1", restart="r", reload="l")
    write_started(tmp_path, {"prometheus": one})
    assert read_started(tmp_path) == {"prometheus": one}
    assert stat.S_IMODE((tmp_path / "processes.json").stat().st_mode) == 0o600
    for text in ("", "[]", '{"prometheus": {}}', '{"prometheus": 3}', "null"):
        (tmp_path / "processes.json").write_text(text)
        assert read_started(tmp_path) == {}


def test_a_second_command_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# --- ports ------------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_refused_by_name_with_the_key_to_change() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SiteError) as raised:
            check_port("prometheus", "127.0.0.1", port, "monitoring.prometheus_port")
    text = str(raised.value)
    assert f"127.0.0.1:{port} is taken by" in text
    assert str(os.getpid()) in text
    assert "set another monitoring.prometheus_port" in text
    check_port("prometheus", "127.0.0.1", port, "monitoring.prometheus_port")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SiteError, match=r"monitoring.address: grafana cannot listen on 192\.0\.2\.1"):
        check_port("grafana", "192.0.2.1", free_ports(1)[0], "monitoring.grafana_port")


def test_nothing_is_started_where_a_port_is_taken(tmp_path: Path, bare: Path) -> None:
    started = tmp_path / "started"
    program(bare / "prometheus", f"case $1 in --version) echo 2.42.0;; *) echo x > {started};; esac")
    site = site_in(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", site.monitoring.prometheus_port))
        other.listen()
        with pytest.raises(SiteError, match="monitoring.prometheus_port"):
            up(site)
    assert not started.exists()
    assert not (stack_folder(site).parent / "agent.json").exists()


def test_down_survives_what_it_finds(tmp_path: Path) -> None:
    site = site_in(tmp_path)
    assert down(site) == []
    folder = stack_folder(site)
    folder.mkdir(parents=True)
    (folder / "processes.json").write_text("{")
    assert down(site) == []
    with subprocess.Popen(["sleep", "60"]) as other:
        stale = Started(pid=other.pid, pid_start=1.0, started=1, url="", version="", restart="", reload="")
        gone = Started(pid=2**22 - 1, pid_start=1.0, started=1, url="", version="", restart="", reload="")
        write_started(folder, {"prometheus": stale, "grafana": gone})
        assert down(site) == []
        assert other.poll() is None
        other.kill()
    assert json.loads((folder / "processes.json").read_text()) == {}


def test_a_log_that_has_grown_is_put_aside(tmp_path: Path, ended: list[tuple[int, float]]) -> None:
    log = log_path(tmp_path, "prometheus")
    log.parent.mkdir()
    log.write_bytes(b"x" * 6_000_000)
    ended.append(start(["sleep", "60"], log))
    assert log.stat().st_size == 0
    assert log.with_name("log.1").stat().st_size == 6_000_000


def test_how_late_sent_samples_are() -> None:
    text = (
        "# HELP x y\n"
        "prometheus_remote_storage_highest_timestamp_in_seconds 1.7952873e+09\n"
        'prometheus_remote_storage_queue_highest_sent_timestamp_seconds{remote_name="home",url="https://x/"} 1.79528729e+09\n'
    )
    assert behind_s(text) == 10
    assert behind_s(text.replace("1.79528729e+09", "0")) is None
    assert behind_s("") is None
