"""What this machine has for a run: cores and memory as far as its cgroups let this process use them, GPUs, and disks."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml  # type: ignore[import-untyped]

from outgrow.contracts import Disk, DiskKind, Gpu, Inventory
from outgrow.storage import nearest_folder


def take_inventory(paths: Iterable[Path]) -> Inventory:
    """What this machine has now, with the disk that each of ``paths`` is on, or will be once it exists; each disk once."""
    limits = cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total
    return Inventory(
        hostname=socket.gethostname(),
        cores=affinity if limits.cpus is None else max(1, min(affinity, int(limits.cpus))),
        memory_bytes=memory if limits.memory_bytes is None else min(memory, limits.memory_bytes),
        gpus=visible_gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        disks=list_disks(paths),
    )


# --- cgroups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CgroupLimits:
    """The tightest limits from this process's own cgroup up to the root; None where nothing is limited."""

    cpus: float | None
    memory_bytes: int | None


def cgroup_limits(membership: Path, mount: Path) -> CgroupLimits:
    """Limits of version 1 and version 2 controllers, whichever the system has.

    ``membership`` is ``/proc/self/cgroup``, ``mount`` ``/sys/fs/cgroup``. Neither is there outside Linux: no limits.
    """
    cpus: list[float] = []
    memory: list[int] = []
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has no list of controllers. A container may see its own cgroup as the root, so parents are read too.
        for folder in _up_to(mount / controllers, path):
            if controllers == "":
                cpus += _quota((folder / "cpu.max",))
                memory += _bytes(folder / "memory.max")
            elif "cpu" in controllers.split(","):
                cpus += _quota((folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
            elif controllers == "memory":
                memory += _bytes(folder / "memory.limit_in_bytes")
    return CgroupLimits(cpus=min(cpus, default=None), memory_bytes=min(memory, default=None))


def _up_to(root: Path, path: str) -> Iterator[Path]:
    folder = root / path.lstrip("/")
    while folder != root:
        yield folder
        folder = folder.parent
    yield root


def _quota(files: tuple[Path, ...]) -> list[float]:
    """CPUs that a quota leaves, as a list of one; empty where there is none (``max`` in version 2, -1 in version 1)."""
    if not all(file.exists() for file in files):
        return []
    quota, period = " ".join(file.read_text() for file in files).split()
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


def _bytes(file: Path) -> list[int]:
    text = file.read_text().strip() if file.exists() else "max"
    return [] if text == "max" else [int(text)]


# --- GPUs and disks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ListedGpu:
    """A GPU of the machine and the name by which ``CUDA_VISIBLE_DEVICES`` may choose it."""

    gpu: Gpu
    uuid: str


def list_gpus() -> tuple[ListedGpu, ...]:
    """Every GPU that NVML knows; none where there is no NVIDIA driver. Any other trouble of the driver is warned of."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ()
    except pynvml.NVMLError as error:
        warnings.warn(f"the NVIDIA driver does not answer, so no GPU is used: {error}", stacklevel=2)
        return ()
    try:
        return tuple(_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> ListedGpu:
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
    gpu = Gpu(
        index=index,
        name=pynvml.nvmlDeviceGetName(device),
        memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(device).total,
        compute_capability=f"{major}.{minor}",
    )
    return ListedGpu(gpu=gpu, uuid=pynvml.nvmlDeviceGetUUID(device))


def visible_gpus(listed: Sequence[ListedGpu], choice: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA will see under ``CUDA_VISIBLE_DEVICES=choice``: all when it is unset, else up to the first unknown one.

    ``choice`` names them by index or by the start of a UUID (CUDA programming guide, "Environment Variables").
    """
    if choice is None:
        return tuple(one.gpu for one in listed)
    chosen: list[Gpu] = []
    for name in choice.split(","):
        found = [one.gpu for one in listed if _is_named(one, name.strip())]
        if len(found) != 1:
            break
        chosen += found
    return tuple(chosen)


def _is_named(listed: ListedGpu, name: str) -> bool:
    return name == str(listed.gpu.index) or (name.startswith("GPU-") and listed.uuid.startswith(name))


def list_disks(paths: Iterable[Path]) -> tuple[Disk, ...]:
    """The disks under ``paths``, each once, by the first of them that is on it."""
    disks: dict[int, Disk] = {}
    for path in paths:
        folder = nearest_folder(path.absolute())
        usage = shutil.disk_usage(folder)
        device = folder.stat().st_dev
        kind = disk_kind(Path("/sys/dev/block"), device)
        disks.setdefault(device, Disk(path=str(path), total_bytes=usage.total, free_bytes=usage.free, kind=kind))
    return tuple(disks.values())


def disk_kind(blocks: Path, device: int) -> DiskKind:
    """What the disk with the number ``device`` is; ``blocks`` is ``/sys/dev/block``, which only Linux has.

    Empty for what is no disk of this machine (a network share) and for disks below others (LVM, RAID, encryption).
    """
    link = blocks / f"{os.major(device)}:{os.minor(device)}"
    if not link.exists():
        return ""
    folder = link.resolve()
    if "/usb" in str(folder):
        return "usb"
    whole = folder.parent if (folder / "partition").exists() else folder
    rotational = whole / "queue/rotational"
    if not rotational.exists() or "/virtual/" in str(folder):
        return ""
    return "hdd" if rotational.read_text().strip() == "1" else "ssd"
