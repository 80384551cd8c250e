"""The inventory counts what this process may use, not what the machine was sold with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pynvml
import pytest

from outgrow.cluster import inventory
from outgrow.cluster.inventory import (
    CgroupLimits,
    ListedGpu,
    cgroup_limits,
    disk_kind,
    list_disks,
    take_inventory,
    visible_gpus,
)
from outgrow.contracts import Gpu, Inventory

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def limits(root: Path, membership: str, files: dict[str, str]) -> CgroupLimits:
    (root / "self").write_text(membership)
    return cgroup_limits(root / "self", tree(root / "cgroup", files))


def test_version_2_takes_the_tightest_of_the_parents(tmp_path: Path) -> None:
    files = {
        "a/b/cpu.max": "max 100000",
        "a/cpu.max": "250000 100000",
        "a/b/memory.max": str(8 * GIB),
        "a/memory.max": str(4 * GIB),
    }
    assert limits(tmp_path, "0::/a/b\n", files) == CgroupLimits(cpus=2.5, memory_bytes=4 * GIB)


def test_version_1_with_controllers_mounted_together(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/box/cpu.cfs_quota_us": "150000",
        "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/box/memory.limit_in_bytes": str(GIB),
    }
    membership = "4:memory:/box\n3:cpu,cpuacct:/box\n2:cpuset:/box\n1:name=systemd:/x:y\n0::/\n"
    assert limits(tmp_path, membership, files) == CgroupLimits(cpus=1.5, memory_bytes=GIB)


def test_a_container_that_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    files = {"cpu.max": "100000 100000", "memory.max": str(GIB)}
    assert limits(tmp_path, "0::/docker/0123\n", files) == CgroupLimits(cpus=1.0, memory_bytes=GIB)


def test_no_cgroups_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path / "absent", tmp_path) == CgroupLimits(cpus=None, memory_bytes=None)


def test_this_machine() -> None:
    here = take_inventory([Path.cwd(), Path.cwd() / "not" / "there"])
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert 0 < here.memory_bytes <= psutil.virtual_memory().total
    assert [disk.path for disk in here.disks] == [str(Path.cwd())]
    assert here.disks[0].total_bytes == shutil.disk_usage(Path.cwd()).total
    assert Inventory.from_dict(here.to_dict()) == here


@pytest.mark.parametrize(("cpus", "cores"), [(0.5, 1), (1.0, 1), (1000.0, None)])
def test_a_quota_lowers_the_cores_but_not_below_one(cpus: float, cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "cgroup_limits", lambda *_: CgroupLimits(cpus=cpus, memory_bytes=GIB))
    here = take_inventory([])
    assert here.cores == (cores or len(os.sched_getaffinity(0)))
    assert here.memory_bytes == GIB


def test_disks_are_counted_once_each(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    disks = list_disks([tmp_path / "a", tmp_path / "b" / "c", Path("/dev/shm/new")])
    assert [disk.path for disk in disks] == [str(tmp_path / "a"), "/dev/shm/new"]


CARDS = [
    ListedGpu(gpu=Gpu(index=i, name="NVIDIA RTX PRO 6000", memory_bytes=96 * GIB, compute_capability="12.0"), uuid=f"GPU-{i}f")
    for i in range(3)
]


@pytest.mark.parametrize(
    ("choice", "seen"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-1", [1]),
        ("GPU-", []),
        ("0,-1,1", [0]),
        ("0, 7, 1", [0]),
        ("MIG", []),
    ],
)
def test_only_the_gpus_that_cuda_will_see_count(choice: str | None, seen: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(CARDS, choice)] == seen


def test_gpus_are_none_without_a_word_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert inventory.list_gpus() == ()


def test_a_driver_in_trouble_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatched() -> None:
        raise pynvml.NVMLError_LibRmVersionMismatch

    monkeypatch.setattr(pynvml, "nvmlInit", mismatched)
    with pytest.warns(UserWarning, match="no GPU is used: RM has detected"):
        assert inventory.list_gpus() == ()


@pytest.mark.gpu
def test_a_real_gpu_is_listed_as_torch_sees_it() -> None:
    import torch

    gpus = take_inventory([]).gpus
    assert len(gpus) == torch.cuda.device_count()
    for number, gpu in enumerate(gpus):
        seen = torch.cuda.get_device_properties(number)
        assert gpu.name == seen.name
        assert gpu.compute_capability == f"{seen.major}.{seen.minor}"


def test_the_kind_of_a_disk_is_that_of_its_whole_device(tmp_path: Path) -> None:
    """Folders and links as Linux has them below /sys."""
    blocks = tmp_path / "dev/block"
    blocks.mkdir(parents=True)

    def device(number: int, below: str, *, rotational: str | None, partition: bool = False) -> None:
        folder = tmp_path / "devices" / below
        folder.mkdir(parents=True)
        whole = folder.parent if partition else folder
        if partition:
            (folder / "partition").write_text("1")
        if rotational is not None:
            (whole / "queue").mkdir()
            (whole / "queue/rotational").write_text(f"{rotational}\n")
        (blocks / f"8:{number}").symlink_to(folder)

    device(0, "pci/nvme/nvme0n1", rotational="0")
    device(1, "pci/ata1/sda/sda1", rotational="1", partition=True)
    device(2, "pci/usb2/sdb/sdb1", rotational="1", partition=True)
    device(3, "virtual/block/dm-0", rotational="1")
    device(4, "pci/odd", rotational=None)
    kinds = [disk_kind(blocks, os.makedev(8, number)) for number in range(6)]
    assert kinds == ["ssd", "hdd", "usb", "", "", ""]
