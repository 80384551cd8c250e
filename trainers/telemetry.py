"""What a rank tells of its own training: every step to its record, and what of it a logged step's event carries.

Everything here is a store into memory or a look at what the loop has read already: no device is waited for, no file is written
and nobody is called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from outgrow.contracts import JsonDict, Loader, StepRows
from outgrow.monitoring.recording.recorder import Recorder
from outgrow.monitoring.recording.slots import Phase, Stage, Wall
from outgrow.trainers.checkpoint.saving import SaveResult
from outgrow.trainers.clock import clock_for
from outgrow.trainers.engines import Mark
from outgrow.trainers.pace import Pace

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SHARDS_EVERY_S = 10.0
"""How often a logged step says what shards have cost: asking reads a file."""


@dataclass(frozen=True)
class Figures:
    """What the loop has read of a step. ``rank_loss`` is of this rank's own rows, NaN where they have no weight."""

    loss: float
    rank_loss: float
    grad_norm: float


class Telemetry:
    """The record of one rank, and the stopwatch that it is told by.

    ``flops_per_token`` gives the model's operations a token by the length of the rows.
    """

    def __init__(
        self, recorder: Recorder, loader: Loader, device: torch.device, flops_per_token: Callable[[int], float]
    ) -> None:
        self._recorder = recorder
        self._loader = loader
        self._pace: Pace[Any] = Pace(clock_for(device))
        self._memory = DeviceMemory(device) if device.type == "cuda" else None
        self._flops_per_token = cache(flops_per_token)
        self._shards_due = 0.0
        self._dropped = 0
        self.mark: Mark = self._pace.mark

    def steps(self) -> Iterator[StepRows]:
        """What the loader yields. From the first on, time is that of steps."""
        for number, rows in enumerate(self._pace.steps(self._loader)):
            if number == 0:
                self._recorder.enter_steps()
            yield rows
        self._recorder.enter("productive")

    def finish_step(self, rows: StepRows) -> None:
        """Tell a step that is done."""
        self._pace.finish_step()
        self._tell_times()
        length = rows.micro_batches[0].token_ids.shape[1]
        self._recorder.step(
            step=rows.step + 1,
            epoch=rows.epoch,
            tokens=rows.tokens,
            padding=len(rows.row_ids) * length - rows.tokens,
            samples=len(rows.row_ids),
            flops=self._flops_per_token(length) * rows.tokens,
        )

    def look(self, figures: Figures, learning_rate: float, dropped: int) -> JsonDict:
        """Tell the figures of a logged step, and that ``dropped`` events are lost; what of all this its event carries."""
        self._recorder.add(events_dropped=dropped - self._dropped)
        self._dropped = dropped
        self._tell_times()  # a device has come to the end of the step by now: its loss was read
        speed = self._pace.look()
        memory = self._device_memory()
        self._recorder.set(
            loss=figures.loss,
            rank_loss=figures.rank_loss,
            gradient_norm=figures.grad_norm,
            learning_rate=learning_rate,
            tokens_per_s=speed.tokens_per_s,
            loader_ready=self._loader.ready_steps(),
            **{f"memory_{kind}": size for kind, size in memory.items()},
        )
        detail = {"counters": self._recorder.counters(), "memory": memory | anonymous_memory()}
        return vars(speed) | {"detail": detail | self._shards()}

    @contextmanager
    def before_steps(self, kind: Wall, phase: Phase) -> Iterator[None]:
        """What runs within comes before the first step."""
        with self._timed(kind, phase):
            yield
        self._recorder.enter("init")

    @contextmanager
    def between_steps(self, kind: Wall, phase: Phase) -> Iterator[None]:
        """What runs within is no part of a step: a validation, the copy of a checkpoint."""
        with self._pace.paused():
            with self._timed(kind, phase):
                yield
            self._recorder.enter_steps()

    @contextmanager
    def _timed(self, kind: Wall, phase: Phase) -> Iterator[None]:
        self._recorder.enter(kind)
        start = time.perf_counter()
        yield
        self._recorder.add_phase(phase, time.perf_counter() - start)

    def saved(self, result: SaveResult) -> None:
        """Tell what came of a checkpoint. Rank 0 alone knows."""
        if result.ref is not None:
            stages: dict[Stage, float] = {"copy": result.copy_s, "write": result.write_s, "commit": result.commit_s}
            self._recorder.checkpoint_committed(result.ref.bytes, stages, result.ended)
        elif result.error:
            self._recorder.add(checkpoints_failed=1)

    def _tell_times(self) -> None:
        for times in self._pace.known():
            self._recorder.times(times.phases, times.step_s)

    def _device_memory(self) -> dict[str, float]:
        if self._memory is None:
            return {}
        sizes, retries = self._memory.read()
        self._recorder.add(allocation_retries=retries)
        return sizes

    def _shards(self) -> JsonDict:
        now = time.monotonic()
        if now < self._shards_due:
            return {}
        self._shards_due = now + _SHARDS_EVERY_S
        counts = self._loader.shard_counts()
        return {"shards": counts.to_dict()} if counts else {}


class DeviceMemory:
    """What the allocator of a CUDA device says of itself; asking it does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._retries = 0

    def read(self) -> tuple[dict[str, float], int]:
        """Bytes allocated, reserved and the most that was allocated; and requests that had to be tried again since the last."""
        stats = torch.cuda.memory_stats(self._device)
        before, self._retries = self._retries, stats.get("num_alloc_retries", 0)
        sizes = {
            "allocated": stats.get("allocated_bytes.all.current", 0),
            "reserved": stats.get("reserved_bytes.all.current", 0),
            "peak": stats.get("allocated_bytes.all.peak", 0),
        }
        return sizes, self._retries - before


def anonymous_memory() -> dict[str, int]:
    """``anon``: bytes of this process's RAM that no file backs; nothing where that cannot be asked for."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:  # no file descriptor is left, or the system has no such file
        return {}
    return {"anon": (int(resident) - int(shared)) * _PAGE_BYTES}
