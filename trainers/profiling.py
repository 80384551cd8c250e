"""A window of steps that is looked at closely: a trace of what ran when, and a page of the device's allocations.

What goes wrong with it, a full disk included, ends the window and nothing else. Files are written behind the loop.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from outgrow.monitoring.memory_history import history_of, render_history
from outgrow.recipes.schema.training import Profile
from outgrow.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "profiles"
_NEVER = 1 << 62
_MOST_ALLOCATIONS = 200_000
_CLOSE_S = 60.0


class ProfileWindow:
    """The window of one rank. ``failure`` is what went wrong, and was logged as a warning; empty where nothing did.

    Files, in ``<run folder>/profiles``: ``rank-00000-steps-10-14.trace.json.gz``, which chrome://tracing and ui.perfetto.dev
    open, and ``….memory.html``. A run that was resumed within the window looks at the rest of it.
    """

    def __init__(
        self, profile: Profile, rank: int, storage: Storage, run_folder: str, device: torch.device, first_step: int
    ) -> None:
        """``first_step`` is the number of finished steps; a window that begins with the next step begins now."""
        self._storage, self._device = storage, device
        self._start, self._last = max(profile.start_step, first_step + 1), profile.start_step + profile.steps - 1
        self._key = f"{run_folder}/{FOLDER}/rank-{rank:05d}-steps-{self._start}-{self._last}"
        self._memory = profile.memory and device.type == "cuda"
        self._profiler: Any = None
        self._step_range: Any = None
        self._writer: threading.Thread | None = None
        self.failure = ""
        wanted = rank in profile.ranks and self._start <= self._last
        self._due = self._start - 1 if wanted else _NEVER
        if wanted and profile.memory and not self._memory:
            self._fail(f"a history of the device's allocations is kept on cuda alone, not on {device.type}")
        self.step(first_step)

    def step(self, step: int) -> None:
        """``step`` is finished."""
        if step >= self._due:
            self._guarded(lambda: self._move(step))

    def close(self) -> None:
        """End a window that the run has not come to the end of, and wait until its files are written, a minute at most."""
        if self._profiler is not None:
            self._guarded(self._end)
        if self._writer is not None:
            self._writer.join(_CLOSE_S)

    def _move(self, step: int) -> None:
        if self._profiler is None:
            self._begin()
        if step >= self._last:
            self._end()
            return
        self._leave_step()
        self._step_range = torch.profiler.record_function(f"step {step + 1}")
        self._step_range.__enter__()
        self._due = step + 1

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS, stacks="python")
        # There is one cycle and no more; without acc_events torch 2.11 warns that others would be lost.
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self._profiler.start()

    def _end(self) -> None:
        self._due = _NEVER
        self._leave_step()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        snapshot = self._end_memory() if self._memory else None
        self._writer = threading.Thread(
            target=self._guarded, args=(lambda: self._write(profiler, snapshot),), name="profile", daemon=True
        )
        self._writer.start()

    def _leave_step(self) -> None:
        if self._step_range is not None:
            step_range, self._step_range = self._step_range, None
            step_range.__exit__(None, None, None)

    def _end_memory(self) -> Any:
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        return snapshot

    def _write(self, profiler: Any, snapshot: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="outgrow-profile-") as folder:
            trace = Path(folder, "trace.json.gz")
            profiler.export_chrome_trace(str(trace))
            self._storage.upload(trace, f"{self._key}.trace.json.gz")
        if snapshot is not None:
            history = history_of(snapshot, self._device.index or 0)
            page = render_history(history, f"{Path(self._key).name}: device memory")
            self._storage.write(f"{self._key}.memory.html", page.encode())

    def _guarded(self, action: Callable[[], None]) -> None:
        """``action``; whatever it raises ends the window and is kept to be said."""
        try:
            action()
        except Exception as error:
            self._due = _NEVER
            self._fail(f"{type(error).__name__}: {error}")
            profiler, self._profiler, self._step_range = self._profiler, None, None
            with contextlib.suppress(Exception):
                if self._memory:
                    torch.cuda.memory._record_memory_history(enabled=None)
                if profiler is not None:
                    profiler.stop()

    def _fail(self, why: str) -> None:
        self.failure = why
        log.warning("%s: %s", self._key, why)
