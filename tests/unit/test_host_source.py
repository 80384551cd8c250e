"""A node's memory, processors, network and tiers' disks, against independent counts; a process's memory and seconds."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from agent_runs import run_view

from outgrow.monitoring.agent import host
from outgrow.monitoring.agent.host import (
    Growing,
    HostSource,
    cgroup_memory,
    cpu_seconds,
    network_bytes,
    node_memory,
    process_cpu_s,
    process_memory,
)
from outgrow.monitoring.agent.samples import Sample

GIB = 2**30
MIB = 2**20


def by_name(samples: list[Sample], name: str) -> dict[tuple[str, ...], float]:
    found = [(sample.labels[1:], sample.value) for sample in samples if sample.metric.name == name]
    assert len(dict(found)) == len(found), "a series came twice"
    return dict(found)


# --- a process --------------------------------------------------------------------------------------------------------


def test_memory_of_a_process_by_kind(tmp_path: Path) -> None:
    before = process_memory(os.getpid())
    anon = bytearray(os.urandom(MIB)) * 48
    with mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_SHARED) as shared:
        shared[:] = bytes(32 * MIB)
        after = process_memory(os.getpid())
    assert set(after) == {"anon", "file", "shmem"}
    assert after["shmem"] - before["shmem"] == pytest.approx(32 * MIB, rel=0.05)
    assert after["anon"] - before["anon"] >= 0.9 * len(anon)
    assert sum(after.values()) == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)


def test_processor_seconds_of_a_process_with_a_strange_name() -> None:
    # A name may hold brackets and spaces, as if it were the rest of the line.
    code = "import sys, time; open('/proc/self/comm', 'w').write('a) R 1 (b'); sys.stdout.write('x'); sys.stdout.flush()\n"
    code += "while time.process_time() < 0.5: pass\nsys.stdout.write('y'); sys.stdout.flush(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.read(2) == b"xy"
            assert 0.45 <= process_cpu_s(child.pid) < 2
        finally:
            child.kill()
        child.wait()
        assert math.isnan(process_cpu_s(child.pid))
        assert process_memory(child.pid) == {}


def test_a_process_that_has_ended_but_was_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_memory(child.pid) == {}
    assert process_cpu_s(child.pid) >= 0
    child.wait()


# --- memory -----------------------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def memory_of(root: Path, membership: str, files: dict[str, str]) -> dict[str, int]:
    (root / "self").write_text(membership)
    return node_memory(root / "self", tree(root / "cgroup", files))


def test_version_2_takes_the_tightest_of_the_parents(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": "max",
        "a/b/memory.current": str(60 * MIB),
        "a/b/memory.stat": "anon 1",
        "a/memory.max": str(100 * MIB),
        "a/memory.current": str(80 * MIB),
        "a/memory.stat": f"anon 5\ninactive_file {30 * MIB}\nactive_file 7",
        "memory.stat": "the root has no limit",
    }
    assert memory_of(tmp_path, "0::/a/b\n", files) == {"total": 100 * MIB, "available": 50 * MIB}


def test_version_1(tmp_path: Path) -> None:
    files = {
        "memory/box/memory.limit_in_bytes": str(100 * MIB),
        "memory/box/memory.usage_in_bytes": str(40 * MIB),
        "memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MIB}",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),  # what it says where there is none
        "memory/memory.usage_in_bytes": str(GIB),
        "memory/memory.stat": "",
    }
    assert memory_of(tmp_path, "4:memory:/box\n3:cpu:/box\n0::/\n", files) == {"total": 100 * MIB, "available": 70 * MIB}


def test_a_container_that_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    files = {"memory.max": str(100 * MIB), "memory.current": str(120 * MIB), "memory.stat": ""}
    assert memory_of(tmp_path, "0::/docker/0123\n", files) == {"total": 100 * MIB, "available": 0}


def test_no_limits_no_cgroups_and_a_path_that_leads_out(tmp_path: Path) -> None:
    assert list(cgroup_memory(tmp_path / "absent", tmp_path)) == []
    assert list(cgroup_memory(tree(tmp_path, {"self": "0::/../../x"}) / "self", tmp_path / "cgroup")) == []
    found = node_memory(tmp_path / "absent", tmp_path)
    assert found["total"] == psutil.virtual_memory().total
    assert 0 < found["available"] <= found["total"]


# --- counters ---------------------------------------------------------------------------------------------------------


def test_a_sum_never_falls() -> None:
    sum_ = Growing()
    assert sum_.add({"eth0": 100, "veth1": 50}) == 150
    assert sum_.add({"eth0": 110, "veth1": 60}) == 170
    assert sum_.add({"eth0": 120}) == 180  # an interface went, and took its 60 along
    assert sum_.add({"eth0": 120, "veth1": 5}) == 185  # another of that name came
    assert sum_.add({"eth0": 30, "veth1": 5}) == 185  # wrapped, or began anew
    assert sum_.add({"eth0": 40, "veth1": 5}) == 195


def test_processor_seconds_agree_with_the_kernel() -> None:
    before = cpu_seconds()
    with open("/proc/stat") as file:
        line = [int(word) / os.sysconf("SC_CLK_TCK") for word in file.readline().split()[1:]]
    after = cpu_seconds()
    user, nice, system, idle, iowait, irq, softirq, steal, *_ = line
    for mode, seconds in (("busy", user + nice + system + irq + softirq + steal), ("idle", idle)):
        assert before[mode] - 1e-3 <= seconds <= after[mode] + 1e-3
    assert after["iowait"] == pytest.approx(iowait, abs=5)


def test_bytes_of_the_network_leave_loopback_out() -> None:
    with open("/proc/net/dev") as file:
        lines = [line.replace(":", " ").split() for line in file.read().splitlines()[2:]]
    received, sent = ({line[0]: int(line[at]) for line in lines if line[0] != "lo"} for at in (1, 9))
    found = network_bytes()
    assert found["received"].keys() == received.keys()
    assert all(found["received"][name] >= received[name] and found["sent"][name] >= sent[name] for name in received)
    assert "lo" not in found["sent"]


# --- the source -------------------------------------------------------------------------------------------------------


def test_what_a_node_shows(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    tiers = {"nvme": str(tmp_path / "there"), "hdd": str(tmp_path / "not" / "yet")}
    old = run_view(run="old", started=1.0, tiers={"nvme": "/elsewhere", "usb": "/"})
    source = HostSource("n", tiers)
    found = list(source.samples([old]))
    assert {sample.labels[0] for sample in found} == {"n"}
    memory = by_name(found, "outgrow_node_memory_bytes")
    assert 0 < memory["available",] <= memory["total",] <= psutil.virtual_memory().total
    assert by_name(found, "outgrow_node_cpu_seconds_total").keys() == {("busy",), ("iowait",), ("idle",)}
    assert by_name(found, "outgrow_node_network_bytes_total").keys() == {("received",), ("sent",)}
    size, free = by_name(found, "outgrow_tier_size_bytes"), by_name(found, "outgrow_tier_free_bytes")
    here = shutil.disk_usage(tmp_path)
    assert size == {("nvme",): here.total, ("hdd",): here.total, ("usb",): shutil.disk_usage("/").total}
    assert free["hdd",] == pytest.approx(here.free, rel=0.2)


def test_of_two_runs_that_name_a_tier_alike_the_newer_one_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(host, "_disk", lambda folder: (asked.append(folder), (10, 1))[1])
    views = [run_view(run=name, started=when, tiers={"nvme": name}) for name, when in (("b", 2.0), ("c", 3.0), ("a", 1.0))]
    assert by_name(list(HostSource("n", {}).samples(views)), "outgrow_tier_size_bytes") == {("nvme",): 10}
    assert asked == ["c"]


def test_a_disk_that_hangs_or_fails_costs_its_own_series(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def disk(folder: str) -> tuple[int, int]:
        if folder == "hangs":
            end.wait()
        if folder == "fails":
            raise OSError(5, "Input/output error", folder)
        return 10, 1

    monkeypatch.setattr(host, "_disk", disk)
    source = HostSource("n", {"share": "hangs", "usb": "fails", "nvme": "well"})
    for _ in range(5):
        begun, found = time.monotonic(), []
        with pytest.raises(OSError, match="Input/output"):
            for sample in source.samples([]):
                found.append(sample)
        assert time.monotonic() - begun < 1.0
        assert by_name(found, "outgrow_tier_size_bytes") == {("nvme",): 10}
    assert sum(thread.name == "disk" for thread in threading.enumerate()) == 1
    end.set()


def test_counters_do_not_fall_when_an_interface_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {"eth0": 1000.0, "veth": 500.0}
    monkeypatch.setattr(host, "network_bytes", lambda: {"received": dict(interfaces)})
    source = HostSource(socket.gethostname(), {})
    shown = []
    for change in ({}, {"eth0": 1100.0}, {"veth": None}, {"eth0": 1200.0}):
        for name, value in change.items():
            if value is None:
                interfaces.pop(name)
            else:
                interfaces[name] = value
        shown.append(by_name(list(source.samples([])), "outgrow_node_network_bytes_total")["received",])
    assert shown == [1500, 1600, 1600, 1700]
