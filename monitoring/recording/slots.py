"""What a rank's record holds, slot by slot: 64-bit floats at fixed places, so that writing one is a store into memory.

``COUNTERS`` only grow and go on across restarts: a new start of the run begins with those of the start before. ``GAUGES`` are
of this start alone. The order of the slots is the format of the file; ``FORMAT`` follows from it, and a reader passes over a
record of another.
"""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias, get_args

Phase: TypeAlias = Literal["data_wait", "forward", "backward", "collectives", "optimizer", "checkpoint", "validation"]
"""What the time of the training loop goes to. ``collectives`` are those that nothing overlaps, between the last backward pass
and the optimizer; those that an engine runs beside its computing are within ``forward`` and ``backward``."""
Wall: TypeAlias = Literal["productive", "init", "checkpoint", "restore", "recompute", "stalled", "idle"]
"""What every second since the first start of the run went to, once each: ``productive`` are finished steps and validations,
``init`` the way to the first step (``restore`` the part that reads a checkpoint), ``recompute`` steps that had been done
before, ``stalled`` waiting for data and what a step takes beyond the stall threshold, ``idle`` when nothing was started."""
RestartCause: TypeAlias = Literal["rank_lost", "error", "asked", "resumed"]
Stage: TypeAlias = Literal["copy", "write", "commit"]
"""Of a checkpoint: the pause of the loop, the writing behind it, and the commit."""
State: TypeAlias = Literal["starting", "running", "finished", "failed", "restarting", "interrupted"]
"""What a rank says of itself; whether it lives is seen from outside."""

PHASES: tuple[Phase, ...] = get_args(Phase)
WALL: tuple[Wall, ...] = get_args(Wall)
CAUSES: tuple[RestartCause, ...] = get_args(RestartCause)
STAGES: tuple[Stage, ...] = get_args(Stage)
STATES: tuple[State, ...] = get_args(State)

STEP_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the step histogram in seconds; one more bucket has none."""
RECENT_STEPS = 64
"""So many of the last step times are kept, for a median."""

COUNTERS = (
    "steps",
    "tokens",
    "padding",
    "samples",
    "model_flops",
    "nonfinite",
    "events_dropped",
    "allocation_retries",
    "checkpoints_committed",
    "checkpoints_failed",
    "checkpoint_bytes",
    *(f"checkpoint_s.{stage}" for stage in STAGES),
    *(f"phase_s.{phase}" for phase in PHASES),
    *(f"wall_s.{kind}" for kind in WALL),
    *(f"restarts.{cause}" for cause in CAUSES),
    *(f"step_bucket.{number}" for number in range(len(STEP_BUCKETS_S) + 1)),
    "step_sum_s",
)
"""``steps``, ``tokens`` (valid), ``padding`` (positions without a token) and ``samples`` (rows) count what was computed over
the global batch, what had to be computed again included; ``model_flops`` too, of all ranks together."""

GAUGES = (
    "state",  # index into STATES
    "pid",
    "pid_start",  # clock ticks since boot: with the pid it names one process
    "first_start",  # Unix seconds of the first start of the run
    "touched",  # Unix seconds of the last change of this record
    "open_kind",  # index into WALL: what the time since open_since goes to
    "open_since",  # seconds of the monotonic clock
    "stepping",  # 1 while that is a step, 0 while it is something between steps
    "stall_threshold",  # seconds from open_since on after which a step counts as stalled; what it is known by, and credited by
    "step",  # finished steps
    "furthest",  # the most finished steps that any start of the run has come to
    "epoch",
    "last_step_time",  # Unix seconds
    "loss",
    "rank_loss",
    "validation_loss",
    "gradient_norm",
    "learning_rate",
    "tokens_per_s",
    "loader_ready",
    "memory_allocated",
    "memory_reserved",
    "memory_peak",
    "measured_flops",  # a second, of this rank's device
    "checkpoint_time",  # Unix seconds of the last commit
    "checkpoint_last_bytes",
    "recent_count",  # how many of the step times have been written, in all
    *(f"recent.{number}" for number in range(RECENT_STEPS)),
)
"""NaN where nothing is known."""

SLOTS = (*COUNTERS, *GAUGES)
INDEX = {name: number for number, name in enumerate(SLOTS)}
FORMAT = int.from_bytes(hashlib.sha256("\n".join(SLOTS).encode()).digest()[:6], "big")
"""Changes with any slot; exact as a float."""
