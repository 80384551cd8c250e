"""How the files of all ranks become one committed checkpoint: through the storage alone, without a collective.

Each rank writes its data file and then its part file into a folder that is aside. Rank 0 waits for all part files, writes
index and manifest, moves the folder into place and writes the marker. A process killed at any point leaves a checkpoint with a
marker, or none.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from outgrow.contracts import CheckpointRef, JsonDict
from outgrow.errors import TrainingError
from outgrow.storage import Storage, digest
from outgrow.trainers.checkpoint.catalog import marker_of
from outgrow.trainers.checkpoint.format import (
    BASE,
    FOLDER,
    LOADER,
    MANIFEST,
    MARKER,
    PIECES,
    RECIPE,
    FileEntry,
    Manifest,
    Part,
    aside_folder,
    aside_of,
    data_file,
    merge,
    part_file,
    step_folder,
    step_of,
    to_json,
)

POLL_S = 0.05
MAX_POLL_S = 1.0


@dataclass(frozen=True)
class Group:
    """Who saves: the run, this start of it, and the place of this process in it."""

    run_folder: str
    attempt: str
    rank: int
    world: int


@dataclass(frozen=True)
class StepState:
    """What belongs to a saved step besides its tensors; only rank 0's is written. ``metrics`` are finite numbers or None.

    ``base`` is the identity of the frozen base that an adapter stands beside; None where there is none.
    """

    step: int
    loader_state: JsonDict
    recipe: JsonDict
    metrics: Mapping[str, float | None]
    base: JsonDict | None = None


def write_data(storage: Storage, key: str, header: bytes, data: memoryview, chunk_bytes: int) -> FileEntry:
    """Write ``header`` and ``data`` as one file, durably, and give its size and the digest of each chunk."""
    digests: list[str] = []
    chunk, room = hashlib.sha256(), chunk_bytes
    with storage.open_write(key) as file:
        for half in (memoryview(header), data):
            start = 0
            while start < len(half):
                block = half[start : start + room]
                chunk.update(block)
                file.write(block)
                start, room = start + len(block), room - len(block)
                if room == 0:
                    digests.append(chunk.hexdigest())
                    chunk, room = hashlib.sha256(), chunk_bytes
        if room < chunk_bytes:
            digests.append(chunk.hexdigest())
        if storage.is_local:
            file.flush()
            os.fsync(file.fileno())
    return FileEntry(size=len(header) + len(data), chunks=tuple(digests))


def wait_for_parts(storage: Storage, group: Group, step: int, patience_s: float, stop: threading.Event) -> list[Part]:
    """The parts of all ranks, in rank order. Raises ``TrainingError`` where one failed or is not there after ``patience_s``."""
    folder = aside_folder(group.run_folder, step, group.attempt)
    deadline = time.monotonic() + patience_s
    poll_s = POLL_S
    while True:
        names = set(storage.names(folder))
        missing = [rank for rank in range(group.world) if part_file(rank) not in names]
        if not missing:
            break
        if stop.is_set() or time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise TrainingError(
                f"step {step} was not saved: nothing from rank {ranks} within {patience_s:.0f} s of rank 0's own write",
                where=folder,
                hint="site.storage must be a folder or bucket that all nodes share and can write",
            )
        stop.wait(poll_s)
        poll_s = min(2 * poll_s, MAX_POLL_S)
    keys = [f"{folder}/{part_file(rank)}" for rank in range(group.world)]
    parts = [Part.unseal(storage.read(key), key) for key in keys]
    failed = [f"rank {part.rank}: {part.error}" for part in parts if part.error]
    if failed:
        raise TrainingError(f"step {step} was not saved: " + "; ".join(failed), where=folder)
    return parts


def commit(storage: Storage, group: Group, state: StepState, parts: list[Part], chunk_bytes: int) -> CheckpointRef:
    """The checkpoint that ``parts`` make up, committed under its step; one that lay there before is replaced."""
    aside = aside_folder(group.run_folder, state.step, group.attempt)
    files = {data_file(part.rank): part.file for part in parts if part.file}
    for name, data in (
        (PIECES, merge({data_file(part.rank): part for part in parts}).to_bytes()),
        (LOADER, to_json(state.loader_state)),
        (RECIPE, to_json(state.recipe)),
        *([(BASE, to_json(state.base))] if state.base is not None else []),
    ):
        storage.write(f"{aside}/{name}", data)
        files[name] = _entry(data, chunk_bytes)
    manifest = Manifest(
        step=state.step,
        world=group.world,
        attempt=group.attempt,
        saved=time.time(),
        metrics=dict(state.metrics),
        chunk_bytes=chunk_bytes,
        files=files,
    )
    data = manifest.to_bytes()
    storage.write(f"{aside}/{MANIFEST}", data)
    for part in parts:
        storage.remove(f"{aside}/{part_file(part.rank)}")
    folder = step_folder(group.run_folder, state.step)
    discard(storage, folder)
    storage.rename(aside, folder)
    storage.write(f"{folder}/{MARKER}", marker_of(data))
    return CheckpointRef(folder=folder, step=state.step, digest=digest(data), bytes=manifest.bytes)


def _entry(data: bytes, chunk_bytes: int) -> FileEntry:
    chunks = tuple(digest(data[start : start + chunk_bytes]) for start in range(0, len(data), chunk_bytes))
    return FileEntry(size=len(data), chunks=chunks)


def discard(storage: Storage, folder: str) -> None:
    """Remove a checkpoint, its marker first: killed half-way it is no checkpoint any more."""
    storage.remove(f"{folder}/{MARKER}")
    storage.remove(folder)


def clear(storage: Storage, group: Group, step: int) -> None:
    """Remove what a failed save of ``step`` left: the folder that is aside, and the one in place if it has no marker yet."""
    storage.remove(aside_folder(group.run_folder, step, group.attempt))
    folder = step_folder(group.run_folder, step)
    if not storage.exists(f"{folder}/{MARKER}"):
        storage.remove(folder)


def sweep(storage: Storage, group: Group, step: int) -> None:
    """Remove what killed saves and half-done removals left: steps without a marker, and folders that are aside.

    Of this attempt's own folders aside only those before ``step``: another rank may have begun on a later one.
    """
    root = f"{group.run_folder}/{FOLDER}"
    for name in storage.names(root):
        folder = f"{root}/{name}"
        aside = aside_of(name)
        dead = aside is not None and (aside[1] != group.attempt or aside[0] < step)
        torn = step_of(name) is not None and not storage.exists(f"{folder}/{MARKER}")
        if dead or torn:
            storage.remove(folder)
