"""What a rank tells about itself while it trains: stores into its mapped record, and nothing that could wait.

The account of wall time is one open interval at a time: every second belongs to the kind that was entered last, so the kinds
add up to the time since the first start of the run by construction, over restarts too.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outgrow.monitoring.recording.rank_file import RankFile, Slots, counters_of, file_name, rank_of, read_record
from outgrow.monitoring.recording.slots import (
    COUNTERS,
    INDEX,
    PHASES,
    RECENT_STEPS,
    STATES,
    STEP_BUCKETS_S,
    WALL,
    Phase,
    RestartCause,
    Stage,
    State,
    Wall,
)
from outgrow.monitoring.recording.stall import BETWEEN_STEPS_S, stall_threshold_s

_PRODUCTIVE, _RECOMPUTE, _STALLED = (INDEX[f"wall_s.{kind}"] for kind in ("productive", "recompute", "stalled"))
_THRESHOLD = INDEX["stall_threshold"]
_STEPS, _TOKENS, _PADDING, _SAMPLES, _FLOPS = (INDEX[name] for name in ("steps", "tokens", "padding", "samples", "model_flops"))
_STEP, _EPOCH, _FURTHEST, _LAST_STEP_TIME = (INDEX[name] for name in ("step", "epoch", "furthest", "last_step_time"))
_OPEN_KIND, _OPEN_SINCE, _TOUCHED = (INDEX[name] for name in ("open_kind", "open_since", "touched"))
_BUCKET, _STEP_SUM = INDEX["step_bucket.0"], INDEX["step_sum_s"]
_RECENT, _RECENT_COUNT = INDEX["recent.0"], INDEX["recent_count"]
_KIND_AT = {kind: float(number) for number, kind in enumerate(WALL)}
_PHASE_AT = {phase: INDEX[f"phase_s.{phase}"] for phase in PHASES}


@dataclass(frozen=True, kw_only=True)
class Before:
    """What earlier starts of a run have left for one rank: counters, and the Unix times that its account goes on from."""

    counters: Mapping[str, float]
    first_start: float
    touched: float
    furthest: int

    @classmethod
    def of_records(cls, run_folder: Path, rank: int) -> Before | None:
        """From the newest record of the rank on this node; None where there is none that can be read."""
        for path in sorted(run_folder.glob(f"*/{file_name(rank)}"), reverse=True):
            record = read_record(path)
            if record is not None and not math.isnan(record["touched"]):
                return cls(
                    counters=counters_of(record),
                    first_start=record["first_start"],
                    touched=record["touched"],
                    furthest=int(record["furthest"]),
                )
        return None

    @classmethod
    def of_counters(cls, when: float, counters: Mapping[str, Any]) -> Before | None:
        """From what ``Recorder.counters`` gave at the Unix time ``when``; None where that is not what it was."""
        known = {name: value for name, value in counters.items() if isinstance(value, int | float) and math.isfinite(value)}
        if "first_start" not in known or "furthest" not in known:
            return None
        return cls(
            counters={name: known.get(name, 0.0) for name in COUNTERS},
            first_start=known["first_start"],
            touched=when,
            furthest=int(known["furthest"]),
        )


class Recorder:
    """The record of one rank in one start of a run. Its methods cost some microseconds and never raise for the disk's sake."""

    def __init__(self, folder: Path | None, rank: int, *, launched: float, before: Before | None, stall_after_s: float) -> None:
        """The record ``rank-*.rec`` in the attempt's ``folder``, in the state ``starting``; in memory alone without a folder.

        ``launched`` is the Unix time at which the command began that started the ranks: what lies between an earlier start and
        it is ``idle``, what lies between it and now is ``init``. Raises ``OSError``.
        """
        now, self._since = time.time(), time.monotonic()
        self._file = RankFile(folder / file_name(rank) if folder else None, before.counters if before else {})
        self._values = self._file.values
        self._stall_after_s = stall_after_s
        self._recent: list[float] = []
        self._sorted: list[float] = []
        self._stepping = False
        self._waited_s = 0.0
        self._kind: Wall = "init"
        begin = min(now, max(launched, before.touched) if before else launched)
        with self._file.writing() as values:
            if before:
                values[INDEX["wall_s.idle"]] += max(0.0, begin - before.touched)
            values[INDEX["wall_s.init"]] += now - begin
            values[INDEX["first_start"]] = before.first_start if before else begin
            values[INDEX["furthest"]] = before.furthest if before else 0
            values[INDEX["recent_count"]] = 0
            values[INDEX["pid"]] = os.getpid()
            values[INDEX["pid_start"]] = start_ticks(os.getpid())
            values[INDEX["state"]] = STATES.index("starting")
            self._open(values, now)

    # --- the account of wall time ---------------------------------------------------------------------------------------

    def enter(self, kind: Wall) -> None:
        """From here on time is of ``kind``, and no step's, until the next ``enter`` or ``enter_steps``."""
        with self._file.writing() as values:
            values[INDEX[f"wall_s.{self._kind}"]] += self._take_interval()
            values[INDEX["stepping"]] = 0
            self._stepping = False
            self._kind = kind
            self._open(values, time.time())

    def enter_steps(self) -> None:
        """From here on the time is that of steps, each of which ends with ``step``."""
        self.enter("productive")
        self._stepping = True
        self.set(stepping=1, state=STATES.index("running"))

    def step(
        self,
        *,
        step: int,
        epoch: int,
        tokens: int,
        padding: int,
        samples: int,
        flops: float,
    ) -> None:
        """A step is done, ``step`` of them in all; counts are of the global batch. Asks the system for the time alone."""
        values = self._values
        values[_STEPS] += 1
        values[_TOKENS] += tokens
        values[_PADDING] += padding
        values[_SAMPLES] += samples
        values[_FLOPS] += flops
        again = step <= values[_FURTHEST]
        interval = self._take_interval()
        computing = min(interval, values[_THRESHOLD])  # as it was said when the step began: who watches has counted by it
        waited = min(self._waited_s, computing)
        self._waited_s -= waited
        values[_STALLED] += interval - computing + waited
        values[_RECOMPUTE if again else _PRODUCTIVE] += computing - waited
        if not again:
            values[_FURTHEST] = step
        now = time.time()
        values[_STEP] = step
        values[_EPOCH] = epoch
        values[_LAST_STEP_TIME] = now
        self._open(values, now)
        self._file.publish()

    def times(self, phases: Mapping[Phase, float], step_s: float) -> None:
        """What one step took, in seconds: known before ``step`` tells that it is done, or on a device some steps later.

        Readers see it with whatever is told next. Waiting for data counts as stalled, from the next ``step`` on.
        """
        values = self._values
        for phase, seconds in phases.items():
            values[_PHASE_AT[phase]] += seconds
        values[_BUCKET + bisect_left(STEP_BUCKETS_S, step_s)] += 1
        values[_STEP_SUM] += step_s
        count = int(values[_RECENT_COUNT])
        values[_RECENT + count % RECENT_STEPS] = step_s
        values[_RECENT_COUNT] = count + 1
        if count < RECENT_STEPS:
            self._recent.append(step_s)
        else:
            del self._sorted[bisect_left(self._sorted, self._recent[count % RECENT_STEPS])]
            self._recent[count % RECENT_STEPS] = step_s
        insort(self._sorted, step_s)
        self._waited_s += phases.get("data_wait", 0.0)

    def open_s(self) -> float:
        """Seconds that the open step, or what goes on between steps, has taken so far. Any thread may ask."""
        return time.monotonic() - self._since

    def threshold_s(self) -> float:
        """Seconds from which on that counts as a stall. Any thread may ask."""
        threshold = self._values[_THRESHOLD]
        return threshold if self._stepping else max(threshold, BETWEEN_STEPS_S)

    # --- the rest -------------------------------------------------------------------------------------------------------

    def set(self, **gauges: float | None) -> None:
        """New values of gauges; None means not known."""
        with self._file.writing() as values:
            for name, value in gauges.items():
                values[INDEX[name]] = math.nan if value is None else value

    def add(self, **counters: float) -> None:
        with self._file.writing() as values:
            for name, value in counters.items():
                values[INDEX[name]] += value

    def add_phase(self, phase: Phase, seconds: float) -> None:
        """Time outside steps: a validation, a checkpoint."""
        self.add(**{f"phase_s.{phase}": seconds})

    def restarted(self, cause: RestartCause) -> None:
        self.add(**{f"restarts.{cause}": 1})

    def checkpoint_committed(self, num_bytes: int, seconds: Mapping[Stage, float], when: float) -> None:
        self.add(checkpoints_committed=1, checkpoint_bytes=num_bytes, **{f"checkpoint_s.{s}": v for s, v in seconds.items()})
        self.set(checkpoint_time=when, checkpoint_last_bytes=num_bytes)

    def counters(self) -> dict[str, Any]:
        """All counters, for ``events.jsonl``: with the open interval given to its kind, and the times of ``Before``."""
        values = self._values
        found: dict[str, Any] = dict(zip(COUNTERS, values, strict=False))
        found[f"wall_s.{self._kind}"] += time.monotonic() - self._since
        return found | {"first_start": values[INDEX["first_start"]], "furthest": values[INDEX["furthest"]]}

    def close(self, state: State) -> None:
        """The rank has come to its end, and says how."""
        with self._file.writing() as values:
            values[INDEX[f"wall_s.{self._kind}"]] += self._take_interval()
            self._open(values, time.time())
            values[INDEX["open_kind"]] = math.nan
            values[INDEX["state"]] = STATES.index(state)
        self._file.close()

    def _median_s(self) -> float | None:
        """As ``statistics.median``, of a list that is in order already."""
        recent = self._sorted
        middle = len(recent) // 2
        if not recent:
            return None
        return recent[middle] if len(recent) % 2 else (recent[middle - 1] + recent[middle]) / 2

    def _take_interval(self) -> float:
        now = time.monotonic()
        interval, self._since = now - self._since, now
        return interval

    def _open(self, values: Slots, now: float) -> None:
        values[_OPEN_KIND] = _KIND_AT[self._kind]
        values[_OPEN_SINCE] = self._since
        values[_TOUCHED] = now
        values[_THRESHOLD] = stall_threshold_s(self._stall_after_s, self._median_s())


def start_ticks(pid: int) -> float:
    """When a process was started, in clock ticks since boot; NaN where no such process runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in brackets, may hold anything: what comes after its last bracket is plain.
            fields = file.read().rpartition(b")")[2].split()
        # One that has ended stays in the list until its parent has asked how.
        return math.nan if fields[0] in (b"Z", b"X") else float(fields[19])
    except OSError:
        return math.nan


def is_alive(record: Mapping[str, float]) -> bool:
    """Whether the very process that wrote ``record`` is there."""
    pid = record["pid"]
    return not math.isnan(pid) and start_ticks(int(pid)) == record["pid_start"]


__all__ = ["Before", "Recorder", "is_alive", "rank_of", "start_ticks"]
