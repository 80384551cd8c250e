"""Which checkpoints a run has: those whose marker, manifest and file sizes hold, newest first, and why others were refused.

Reads a few small files a checkpoint and none of the tensors; whoever loads one verifies the rest as it reads. Imports no torch,
so that a listing is quick.
"""

from __future__ import annotations

from dataclasses import dataclass

from outgrow.contracts import CheckpointRef
from outgrow.errors import IntegrityError
from outgrow.storage import Storage, digest
from outgrow.trainers.checkpoint.format import FOLDER, MANIFEST, MARKER, Manifest, parse, step_of


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint and its manifest."""

    ref: CheckpointRef
    manifest: Manifest


@dataclass(frozen=True)
class Refused:
    """A checkpoint that has a marker but is not whole: its folder and what is wrong with it."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """The committed checkpoints of a run, newest first. What has no marker is no checkpoint and in neither list."""

    saved: tuple[Saved, ...]
    refused: tuple[Refused, ...]


def survey(storage: Storage, run_folder: str) -> Survey:
    """All that lies in the run's checkpoint folder, each checked by marker, manifest and sizes.

    Raises ``OSError`` where the storage does not answer: that says nothing about the checkpoint.
    """
    root = f"{run_folder}/{FOLDER}"
    steps = {step: name for name in storage.names(root) if (step := step_of(name)) is not None}
    saved: list[Saved] = []
    refused: list[Refused] = []
    for _, name in sorted(steps.items(), reverse=True):
        folder = f"{root}/{name}"
        if not storage.exists(f"{folder}/{MARKER}"):
            continue
        try:
            saved.append(examine(storage, folder))
        except (IntegrityError, FileNotFoundError) as error:
            refused.append(Refused(folder, str(error)))
    return Survey(tuple(saved), tuple(refused))


def examine(storage: Storage, folder: str) -> Saved:
    """The committed checkpoint in ``folder``. Raises ``IntegrityError`` where marker, manifest or a file's size do not hold."""
    data = storage.read(f"{folder}/{MANIFEST}")
    where = f"{folder}/{MANIFEST}"
    marker = storage.read(f"{folder}/{MARKER}")
    if marker != marker_of(data):
        raise IntegrityError(f"the bytes differ from the digest in {MARKER}", where=where)
    manifest = parse(Manifest, data, where)
    if step_of(folder.rpartition("/")[2]) != manifest.step:
        raise IntegrityError(f"the manifest is of step {manifest.step}", where=where)
    sizes = storage.sizes(folder)
    for name, entry in manifest.files.items():
        if name not in sizes:
            raise IntegrityError("the file is missing", where=f"{folder}/{name}")
        if sizes[name] != entry.size:
            raise IntegrityError(f"{sizes[name]} bytes, written were {entry.size}", where=f"{folder}/{name}")
    ref = CheckpointRef(folder=folder, step=manifest.step, digest=digest(data), bytes=manifest.bytes)
    return Saved(ref, manifest)


def marker_of(manifest: bytes) -> bytes:
    """The content of the marker that commits ``manifest``."""
    return f"{digest(manifest)}\n".encode()


def list_checkpoints(storage: Storage, run_folder: str) -> tuple[CheckpointRef, ...]:
    """The committed checkpoints of a run, newest first."""
    return tuple(saved.ref for saved in survey(storage, run_folder).saved)


def newest(storage: Storage, run_folder: str) -> CheckpointRef | None:
    """The newest committed checkpoint; None where the run has none. ``resume`` also falls back from one that does not load."""
    return next(iter(list_checkpoints(storage, run_folder)), None)
