"""Saves a run's state behind its back: the loop waits for one copy into memory, a thread does the rest.

On a rank other than 0 a save ends when its own file is written; rank 0 commits and alone knows the outcome. A save that fails
is told, not raised: training goes on, and the older checkpoints stay as they are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from outgrow.contracts import CheckpointRef
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import survey
from outgrow.trainers.checkpoint.commit import Group, StepState, clear, commit, discard, sweep, wait_for_parts, write_data
from outgrow.trainers.checkpoint.format import CHUNK_BYTES, Part, aside_folder, data_file, part_file
from outgrow.trainers.checkpoint.retention import Retention, to_remove
from outgrow.trainers.checkpoint.snapshot import Snapshot
from outgrow.trainers.regions import Held

PATIENCE_S = 1800.0
"""How long rank 0 waits for the slowest rank after its own file is written."""


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How one save went. ``ref`` on rank 0 alone, None where nothing was committed; ``error`` empty where all went well.

    ``bytes`` is what this rank wrote; ``copy_s`` is what the loop waited, the other stages ran behind it. ``ended`` is Unix
    seconds. An ``error`` beside a ``ref`` says that old checkpoints could not be removed.
    """

    step: int
    ref: CheckpointRef | None
    error: str
    bytes: int
    copy_s: float
    write_s: float
    commit_s: float
    ended: float


@dataclass
class _Progress:
    """What the thread of one save has reached; becomes its ``SaveResult``."""

    copy_s: float
    ref: CheckpointRef | None = None
    errors: list[str] = field(default_factory=list)
    write_s: float = 0.0
    commit_s: float = 0.0


class Checkpointer:
    """Saves ``tensors`` of one run from every rank of it; one save at a time, all ranks the same steps in the same order.

    Sets ``buffer_bytes`` of host memory aside at once. Rank 0 also clears away what killed saves of this run left behind.
    ``distrusted`` are folders that ``resume`` refused.
    """

    def __init__(
        self,
        storage: Storage,
        group: Group,
        tensors: Mapping[str, Held],
        retention: Retention,
        *,
        distrusted: Collection[str] = (),
        chunk_bytes: int = CHUNK_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._storage = storage
        self._group = group
        self._retention = retention
        self._distrusted = frozenset(distrusted)
        self._chunk_bytes = chunk_bytes
        self._patience_s = patience_s
        self._snapshot = Snapshot(tensors, group.rank, group.world)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: CheckpointRef | None = None
        self._untold: list[SaveResult] = []
        self.failures = 0
        """Saves that this rank knows to have failed."""
        if group.rank == 0:
            sweep(storage, group, step=0)

    @property
    def buffer_bytes(self) -> int:
        """Host memory held for copies, bytes."""
        return self._snapshot.buffer_bytes

    def save(self, tensors: Mapping[str, Held], state: StepState) -> None:
        """Copy this rank's parts and return; the rest happens behind. Waits first for a save that is still being written.

        Ask ``busy`` on all ranks before: ranks that wait for a slow disk hold up the others in the next step.
        """
        self.wait()
        start = time.perf_counter()
        self._snapshot.take(tensors)
        progress = _Progress(copy_s=time.perf_counter() - start)
        self._thread = threading.Thread(target=self._finish, args=(state, progress), name=f"save-{state.step}", daemon=True)
        self._thread.start()

    def busy(self) -> bool:
        """Whether a save is still being written or, on rank 0, committed."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> CheckpointRef | None:
        """What this process committed last, after the save in flight; None before that, and on ranks other than 0."""
        if self._thread is not None:
            self._thread.join()
        return self._last

    def results(self) -> list[SaveResult]:
        """The saves that ended since this was asked last."""
        told, self._untold = self._untold, []
        return told

    def close(self, grace_s: float = 30.0) -> None:
        """Give a save in flight ``grace_s`` more, then stop waiting for other ranks. Call ``wait`` before to lose none.

        Waits at its first call alone.
        """
        if self._thread is not None and not self._stop.is_set():
            self._thread.join(grace_s)
            self._stop.set()
            self._thread.join(grace_s)
        if not self.busy():
            self._snapshot.release()

    def _finish(self, state: StepState, progress: _Progress) -> None:
        # Anything at all that a disk, a bucket's library or we do wrong here must be told and must not stop the run.
        try:
            self._write_and_commit(state, progress)
        except Exception as error:
            progress.errors.append(str(error) or repr(error))
        if progress.errors and progress.ref is None:
            self.failures += 1
        self._last = progress.ref or self._last
        self._untold.append(
            SaveResult(
                step=state.step,
                ref=progress.ref,
                error="; ".join(progress.errors),
                bytes=len(self._snapshot.header) + self.buffer_bytes,
                copy_s=progress.copy_s,
                write_s=progress.write_s,
                commit_s=progress.commit_s,
                ended=time.time(),
            )
        )

    def _write_and_commit(self, state: StepState, progress: _Progress) -> None:
        start = time.perf_counter()
        try:
            self._write(state, progress)
            written = time.perf_counter()
            progress.write_s = written - start
            if self._group.rank == 0:
                self._commit(state, progress)
                progress.commit_s = time.perf_counter() - written
        finally:
            if self._group.rank == 0 and progress.ref is None:
                clear(self._storage, self._group, state.step)

    def _write(self, state: StepState, progress: _Progress) -> None:
        """Write this rank's file, then the part file that says so, or why not."""
        group, storage = self._group, self._storage
        folder = aside_folder(group.run_folder, state.step, group.attempt)
        key = f"{folder}/{data_file(group.rank)}"
        try:
            file = write_data(storage, key, self._snapshot.header, self._snapshot.data, self._chunk_bytes)
            part = Part(rank=group.rank, file=file, tensors=self._snapshot.tensors)
        except Exception as error:
            progress.errors.append(f"{key}: {error!r}")
            # Gone first: on a full disk it makes the room in which the failure can be told.
            storage.remove(key)
            part = Part(rank=group.rank, error=repr(error))
        storage.write(f"{folder}/{part_file(group.rank)}", part.sealed())

    def _commit(self, state: StepState, progress: _Progress) -> None:
        group, storage = self._group, self._storage
        parts = wait_for_parts(storage, group, state.step, self._patience_s, self._stop)
        progress.ref = commit(storage, group, state, parts, self._chunk_bytes)
        found = survey(storage, group.run_folder).saved
        for saved in to_remove(found, state.step, self._retention, self._distrusted):
            discard(storage, saved.ref.folder)
        sweep(storage, group, state.step)
