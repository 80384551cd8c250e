"""What a node has and does: memory as far as its cgroups let this process use it, processors, network, and tiers' disks."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from outgrow.monitoring import metrics
from outgrow.monitoring.agent.background import Background
from outgrow.monitoring.agent.samples import Sample
from outgrow.recipes.schema.site import Site
from outgrow.storage import nearest_folder

if TYPE_CHECKING:
    from outgrow.monitoring.agent.scan import RunView

DISK_WAIT_S = 0.02
DISK_MAX_AGE_S = 120.0
"""What a disk said longer ago is not shown: a network share that hangs would look as if it were well."""

_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_KINDS = {"RssAnon": "anon", "RssFile": "file", "RssShmem": "shmem"}
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


# --- a process --------------------------------------------------------------------------------------------------------


def process_memory(pid: int) -> dict[str, int]:
    """Bytes of a process in RAM by kind (anon, file, shmem); empty where it is gone, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            found = (line.partition(":") for line in file)
            return {_KINDS[key]: int(value.split()[0]) * 1024 for key, _, value in found if key in _KINDS}
    except (OSError, ValueError, IndexError):
        return {}


def process_cpu_s(pid: int) -> float:
    """Processor seconds of a process, those of its threads included and of its children not; NaN where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in brackets, may hold anything: what comes after its last bracket is plain.
            user, system = file.read().rpartition(b")")[2].split()[11:13]
    except (OSError, ValueError):
        return math.nan
    return (int(user) + int(system)) / _TICKS_PER_S


# --- memory -----------------------------------------------------------------------------------------------------------


def node_memory(membership: Path = _MEMBERSHIP, mount: Path = _CGROUPS) -> dict[str, int]:
    """Bytes of RAM, total and available, of the machine or of the tightest cgroup that this process is in."""
    machine = psutil.virtual_memory()
    total, available = [machine.total], [machine.available]
    for limit, used in cgroup_memory(membership, mount):
        total.append(limit)
        available.append(max(0, limit - used))
    return {"total": min(total), "available": min(available)}


def cgroup_memory(membership: Path, mount: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of memory, in bytes, of every limited cgroup from this process's own up to the root, version 1 and 2.

    Use is without file pages that nobody has touched lately: the kernel gives those up before it refuses any. A cgroup may
    go while it is read; it is passed over then.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers not in ("", "memory"):
            continue
        limit, use, idle = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        for folder in _up_to(mount / controllers, path):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / use).read_text())
                if most != "max":
                    yield int(most), max(0, used - _counted(folder / "memory.stat", idle))
            except (OSError, ValueError):
                continue


def _up_to(root: Path, path: str) -> Iterator[Path]:
    """Folders of a cgroup and of its parents. A container may see its own cgroup as the root, so that is read too."""
    folder = root / path.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _counted(file: Path, name: str) -> int:
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


# --- counters ---------------------------------------------------------------------------------------------------------


class Growing:
    """A sum over parts that never falls.

    The kernel takes an interface away with all that it has counted, and lets the time of waiting for disks fall back a little.
    Prometheus would take that for a counter that began anew, and add the whole of it once more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[str, float] = {}
        self._total = 0.0

    def add(self, parts: Mapping[str, float]) -> float:
        """The total after ``parts`` have come to these values; a part that fell counts from where it is now."""
        with self._lock:
            self._total += sum(max(0.0, value - self._parts.get(name, 0.0)) for name, value in parts.items())
            self._parts = dict(parts)
            return self._total


def cpu_seconds() -> dict[str, float]:
    """Processor seconds of all cores since boot by mode; time of guests is within ``user`` already."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(times, kind, 0.0) for kind in kinds)
    waiting = {"iowait": times.iowait} if hasattr(times, "iowait") else {}
    return {"busy": busy, "idle": times.idle, **waiting}


def network_bytes() -> dict[str, dict[str, float]]:
    """Bytes by direction and interface, loopback left out."""
    counted = psutil.net_io_counters(pernic=True, nowrap=False)
    found = {name: one for name, one in counted.items() if name not in ("lo", "lo0")}
    return {
        "received": {name: one.bytes_recv for name, one in found.items()},
        "sent": {name: one.bytes_sent for name, one in found.items()},
    }


# --- disks of tiers ---------------------------------------------------------------------------------------------------


def local_tiers(site: Site) -> dict[str, str]:
    """Folders of the site's tiers on disk, by name."""
    return {tier.name: tier.path for tier in site.tiers if not tier.is_bucket}


def _disk(folder: str) -> tuple[int, int]:
    """Bytes of the disk that a folder is on, or will be once it exists, and bytes free on it."""
    usage = shutil.disk_usage(nearest_folder(Path(folder).expanduser().absolute()))
    return usage.total, usage.free


class HostSource:
    """Memory, processors, network and tiers' disks of this node; ``tiers`` are folders by name, those of runs come on top."""

    part = "host"

    def __init__(self, host: str, tiers: Mapping[str, str]) -> None:
        self._host, self._tiers = host, dict(tiers)
        self._counters: dict[str, Growing] = {}
        self._disks: dict[str, Background[tuple[int, int]]] = {}

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        host = self._host
        for kind, num_bytes in node_memory().items():
            yield Sample(metrics.NODE_MEMORY, (host, kind), num_bytes)
        for mode, seconds in cpu_seconds().items():
            yield Sample(metrics.NODE_CPU_SECONDS, (host, mode), self._grown(mode, {mode: seconds}))
        for direction, interfaces in network_bytes().items():
            yield Sample(metrics.NODE_NETWORK_BYTES, (host, direction), self._grown(direction, interfaces))
        yield from self._tier_disks(runs)

    def _grown(self, name: str, parts: Mapping[str, float]) -> float:
        return self._counters.setdefault(name, Growing()).add(parts)

    def _tier_disks(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        tiers = dict(self._tiers)
        for run in sorted(runs, key=lambda run: run.facts.started, reverse=True):
            tiers = {**run.facts.tiers, **tiers}
        self._disks = {
            folder: self._disks.get(folder) or Background(partial(_disk, folder), name="disk") for folder in set(tiers.values())
        }
        failed: OSError | None = None
        for tier, folder in tiers.items():
            try:
                reading = self._disks[folder].get(DISK_WAIT_S)
            except OSError as error:
                failed = error
                continue
            if reading is not None and reading.age_s <= DISK_MAX_AGE_S:
                size, free = reading.value
                yield Sample(metrics.TIER_SIZE, (self._host, tier), size)
                yield Sample(metrics.TIER_FREE, (self._host, tier), free)
        if failed is not None:
            raise failed
