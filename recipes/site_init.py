"""The text of a first site.yaml, made from what a machine has."""

from __future__ import annotations

import json
from pathlib import Path

from outgrow.contracts import Disk, Inventory

_GIB = 2**30


def init_site(inventory: Inventory, home: Path) -> str:
    """A commented site.yaml: storage and cache on the disk with the most free space, spinning and USB disks left for last, and
    a tier for each disk where they are of several kinds."""
    storage, cache, free = _folders(inventory.disks, home)
    gpus = ", ".join(gpu.name for gpu in inventory.gpus) or "no GPU"
    machine = f"{inventory.cores} cores, {inventory.memory_bytes / _GIB:.0f} GiB of memory, {gpus}"
    return f"""\
# Where runs go on this machine: {machine}.
# Nothing in it changes what is learned. Every key: docs/site.md
schema: 1

# Datasets and runs; {free}. Several nodes need a place that all of them reach:
#   storage: s3://bucket/prefix
#   storage_options: {{key: "${{env:AWS_ACCESS_KEY_ID}}", secret: "${{env:AWS_SECRET_ACCESS_KEY}}"}}
storage: {storage}

# Work that is not kept; a fast local disk.
cache: {cache}

{_tiers(inventory.disks, storage)}

# Names that recipes use, and the folder of each. python-stdlib is always there.
sources: {{}}
#   texts: ~/texts

# auto: one rank a GPU, or one on a machine without; the cores of a node are divided among its ranks.
workers: auto
threads_per_worker: auto
device: auto

# auto: the Ray cluster that this machine belongs to, else an embedded one; or host:port of a head.
cluster:
  address: auto
"""


_SLOWNESS = {"ssd": 0, "": 0, "hdd": 1, "usb": 2}
_NO_TIERS = """\
# Disks and buckets, fastest first; a dataset on a slower one is read through the first, just in time. One disk needs none.
#   - {name: nvme, path: /nvme/outgrow, capacity: 800 GB}
#   - {name: bucket, path: "s3://bucket/prefix", options: {key: "${env:AWS_KEY}", secret: "${env:AWS_SECRET}"}}
tiers: []"""


def _tiers(disks: tuple[Disk, ...], storage: str) -> str:
    """``tiers`` and ``place`` where disks are of several kinds, so that one is worth reading through another: the one of each
    kind with the most free space."""
    largest: dict[str, Disk] = {}
    for disk in sorted(disks, key=lambda disk: (_SLOWNESS[disk.kind], -disk.free_bytes)):
        largest.setdefault(disk.kind or "disk", disk)
    if len(largest) < 2:
        return _NO_TIERS
    (first, _), *others = largest.items()
    places = [(first, storage), *((name, json.dumps(f"{disk.path.rstrip('/')}/outgrow")) for name, disk in others)]
    return "\n".join(
        [
            "# Fastest first; a dataset on a slower one is read through the first, just in time. Remove disks that outgrow is",
            "# to leave alone; capacity: 500 GB bounds what it may take. Nothing is written to one before it is needed there.",
            "tiers:",
            *(f"  - {{name: {name}, path: {path}}}" for name, path in places),
            "",
            "# What is to lie whole on which tiers; outgrow data place shows it, outgrow data place --apply copies.",
            f"place: {{checkpoints: [{others[0][0]}]}}",
        ]
    )


def _folders(disks: tuple[Disk, ...], home: Path) -> tuple[str, str, str]:
    """Storage, cache, and a word on free space. The home's own disk wins a tie and keeps the usual hidden folders."""
    usual = ("~/.local/share/outgrow", "~/.cache/outgrow")
    if not disks:
        return (*usual, "free space unknown")
    at_home = max((disk for disk in disks if home.is_relative_to(disk.path)), key=lambda disk: len(disk.path), default=None)
    best = max(disks, key=lambda disk: (-_SLOWNESS[disk.kind], disk.free_bytes, disk is at_home))
    free = f"{best.free_bytes / _GIB:.0f} GiB are free there"
    if best is at_home:
        return (*usual, free)
    return json.dumps(f"{best.path}/outgrow"), json.dumps(f"{best.path}/outgrow-cache"), free
