"""What a run's own records say of it, put in order: from ``events.jsonl`` and the files beside it alone.

A restart takes the run back to a checkpoint. What an earlier start had done beyond it is no part of the run any more, but for
the time it took: such steps are left out of the curves, and counted. Records of runs that wrote less than today's do give
what they have; what is not there is None or empty, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from outgrow.contracts import JsonDict, RunRef, ShardCounts, StepRecord
from outgrow.monitoring.events import read_events
from outgrow.monitoring.recording.slots import PHASES, WALL
from outgrow.monitoring.report.curves import Interval
from outgrow.storage import Storage

Ceiling: TypeAlias = Literal["vendor", "measured"]

PLAN_FILE = "plan.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class StoredFacts:
    """What is stored beside the records: the run's reference, when it was made (ISO 8601), its recipe. ``owner`` runs it now,
    else empty."""

    ref: RunRef
    created: str
    recipe: JsonDict
    owner: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the ranks. ``undone_steps`` had been done beyond ``step`` and were lost; ``away_s`` is the time since the
    record before it; ``facts`` are those of the attempt as the record carries them, empty where it carries none."""

    attempt: str
    time: float
    step: int
    cause: str
    world: int
    device: str
    undone_steps: int
    away_s: float
    facts: JsonDict
    detail: JsonDict


@dataclass(frozen=True, kw_only=True)
class Save:
    """One checkpoint: seconds of its stages; ``error`` where it failed."""

    step: int
    time: float
    bytes: int
    copy_s: float
    write_s: float
    commit_s: float
    error: str


@dataclass(frozen=True, kw_only=True)
class Account:
    """The counters of one record: ``time`` Unix seconds, ``seconds`` of wall time by kind."""

    step: int
    time: float
    seconds: dict[str, float]

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time that went to steps that count; 0 where no time has passed."""
        return self.seconds.get("productive", 0.0) / self.wall_s if self.wall_s else 0.0


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that a report shows of one run. ``steps`` and ``validations`` are records in the order of their steps, without those
    that were undone; ``roll_backs`` are the times that the run itself went back; ``phases`` and ``traffic`` are what was
    counted between logged steps. ``accounts`` are in the order of time. ``undone_records`` counts the logged steps left out."""

    stored: StoredFacts
    starts: tuple[Start, ...]
    steps: tuple[StepRecord, ...]
    validations: tuple[StepRecord, ...]
    roll_backs: tuple[StepRecord, ...]
    saves: tuple[Save, ...]
    last: StepRecord | None
    undone_records: int
    counters: dict[str, float]
    accounts: tuple[Account, ...]
    phases: tuple[Interval, ...]
    traffic: tuple[Interval, ...]
    shards: ShardCounts | None
    plan: JsonDict | None
    stored_bytes: int

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.stored.ref.folder.rpartition("/")[2]

    @property
    def state(self) -> str:
        if self.stored.owner:
            return f"running ({self.stored.owner})"
        if self.last is None:
            return "not started"
        return "finished" if self.last.kind == "end" else "stopped"

    def mfu(self, record: StepRecord, ceiling: Ceiling) -> float | None:
        """Model FLOPs a second over what the devices can do; None where either is not known.

        That is what their vendor says, or what a matrix product on rank 0 has measured, as if all were like that one.
        """
        start = next((start for start in reversed(self.starts) if start.attempt == record.attempt), None)
        if start is None:
            return None
        facts = start.facts
        one = facts.get("vendor_flops") if ceiling == "vendor" else start.detail.get("measured_flops")
        able = number(one) * number(facts.get("world"))
        found = number(record.tokens_per_s) * number(facts.get("flops_per_token")) / able if able else math.nan
        return found if math.isfinite(found) and found > 0 else None


def collect(storage: Storage, stored: StoredFacts) -> RunFacts:
    """The facts of a run. Reads its records, its plan where there is one, and the sizes of its checkpoints."""
    gathered = _Gathered()
    for record in read_events(storage, stored.ref.folder):
        gathered.take(record)
    plan_key = f"{stored.ref.folder}/{PLAN_FILE}"
    return RunFacts(
        stored=stored,
        starts=tuple(gathered.starts),
        steps=tuple(gathered.steps),
        validations=tuple(gathered.validations),
        roll_backs=tuple(gathered.roll_backs),
        saves=tuple(gathered.saves),
        last=gathered.last,
        undone_records=gathered.undone,
        counters=gathered.counters,
        accounts=tuple(gathered.accounts),
        phases=_surviving(gathered.phases, gathered.steps),
        traffic=_surviving(gathered.traffic, gathered.steps),
        shards=gathered.shards,
        plan=_read_plan(storage, plan_key),
        stored_bytes=_checkpoint_bytes(storage, stored.ref.folder),
    )


def _read_plan(storage: Storage, key: str) -> JsonDict | None:
    """None where the run was started without one, or it cannot be read."""
    try:
        found = storage.read_json(key) if storage.exists(key) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _checkpoint_bytes(storage: Storage, folder: str) -> int:
    """What the kept checkpoints take."""
    kept = f"{folder}/{CHECKPOINTS}"
    steps = [f"{kept}/{name}" for name in storage.names(kept) if name.startswith("step-")]
    return sum(sum(storage.sizes(step).values()) for step in steps)


def number(value: Any) -> float:
    """``value`` as a finite number; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def numbers(value: Any) -> dict[str, float]:
    """What of a JSON value is numbers by name."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): float(own) for name, own in value.items() if not isinstance(own, bool) and math.isfinite(number(own))}


# --- from records, in the order they were written ---------------------------------------------------------------------


@dataclass
class _Gathered:
    """The lists of ``RunFacts``, as they stand after each record."""

    starts: list[Start] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    validations: list[StepRecord] = field(default_factory=list)
    roll_backs: list[StepRecord] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    last: StepRecord | None = None
    undone: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    accounts: list[Account] = field(default_factory=list)
    phases: list[Interval] = field(default_factory=list)
    traffic: list[Interval] = field(default_factory=list)
    shards: ShardCounts | None = None
    furthest: int = 0
    _counted: StepRecord | None = None
    _carried: StepRecord | None = None

    def take(self, record: StepRecord) -> None:
        if record.kind == "start":
            self.starts.append(_start(record, self.last, self.furthest))
            self.undone += _drop_beyond(self.steps, record.step)
            _drop_beyond(self.validations, record.step)
        elif record.kind == "step":
            self.undone += _drop_beyond(self.steps, record.step - 1)
            self.steps.append(record)
        elif record.kind == "validation":
            _drop_beyond(self.validations, record.step - 1)
            self.validations.append(record)
        elif record.kind == "roll_back":
            self.undone += _drop_beyond(self.steps, record.step)
            _drop_beyond(self.validations, record.step)
            self.roll_backs.append(record)
            self.furthest = record.step  # what lies beyond was given up, not lost
        elif record.kind == "checkpoint":
            self.saves.append(_save(record))
        self.furthest = max(self.furthest, record.step)
        self._count(record)
        self._carry(record)
        self.last = record

    def _count(self, record: StepRecord) -> None:
        counters = numbers(record.detail.get("counters"))
        if not counters:
            return
        seconds: dict[str, float] = {kind: counters[f"wall_s.{kind}"] for kind in WALL if f"wall_s.{kind}" in counters}
        if seconds:
            self.accounts.append(Account(step=record.step, time=record.time, seconds=seconds))
        if self.counters and self._counted:
            names = {phase: f"phase_s.{phase}" for phase in PHASES if f"phase_s.{phase}" in counters}
            grown: dict[str, float] = {phase: counters[name] - self.counters.get(name, 0.0) for phase, name in names.items()}
            steps = counters.get("steps", 0.0) - self.counters.get("steps", 0.0)
            # Counters that fell are those of another node that knew nothing of the first: nothing can be said of between.
            if steps > 0 and all(value >= 0 for value in grown.values()):
                self.phases.append(_interval(self._counted, record, steps, grown))
        self.counters, self._counted = counters, record

    def _carry(self, record: StepRecord) -> None:
        counts = _shards(record.detail.get("shards"))
        if counts is None:
            return
        if self.shards and self._carried:
            before, after = _flat(self.shards), _flat(counts)
            grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
            if any(value < 0 for value in grown.values()):  # another node has begun to count
                grown = after
            if record.time > self._carried.time:
                self.traffic.append(_interval(self._carried, record, max(0, record.step - self._carried.step), grown))
        self.shards, self._carried = counts, record


def _drop_beyond(records: list[StepRecord], step: int) -> int:
    """How many of the last ``records``, in the order of their steps, were taken off as being beyond ``step``."""
    dropped = 0
    while records and records[-1].step > step:
        records.pop()
        dropped += 1
    return dropped


def _interval(before: StepRecord, after: StepRecord, steps: float, values: dict[str, float]) -> Interval:
    return Interval(step=after.step, time=after.time, seconds=after.time - before.time, steps=steps, values=values)


def _start(record: StepRecord, before: StepRecord | None, furthest: int) -> Start:
    detail = record.detail
    facts = detail.get("facts")
    world = number(detail.get("world"))
    return Start(
        attempt=record.attempt,
        time=record.time,
        step=record.step,
        cause=str(detail.get("cause") or ""),
        world=0 if math.isnan(world) else int(world),
        device=str(detail.get("device") or ""),
        undone_steps=max(0, furthest - record.step),
        away_s=max(0.0, record.time - before.time) if before else 0.0,
        facts=facts if isinstance(facts, dict) else {},
        detail=detail,
    )


def _save(record: StepRecord) -> Save:
    """Its own step stands in the detail: what ended may have begun some steps before."""
    found = numbers(record.detail)
    return Save(
        step=int(found.get("step", record.step)),
        time=record.time,
        bytes=int(found.get("bytes", 0)),
        copy_s=found.get("copy_s", 0.0),
        write_s=found.get("write_s", 0.0),
        commit_s=found.get("commit_s", 0.0),
        error=str(record.detail.get("error") or ""),
    )


def _shards(value: Any) -> ShardCounts | None:
    try:
        return ShardCounts.from_dict(value) if isinstance(value, Mapping) else None
    except (TypeError, KeyError, AttributeError):  # of another version of outgrow
        return None


def _flat(counts: ShardCounts) -> dict[str, float]:
    """The counters by name; bytes read as ``bytes.<tier>``."""
    tiers = {f"bytes.{name}": float(own.bytes) for name, own in counts.tiers.items()}
    return {"hits": float(counts.hits), "misses": float(counts.misses), "wait_s": counts.wait_s, **tiers}


def _surviving(intervals: Sequence[Interval], steps: Iterable[StepRecord]) -> tuple[Interval, ...]:
    """Those that end with a step that is part of the run, in the order of their steps."""
    ends = {(record.step, record.time) for record in steps}
    return tuple(interval for interval in intervals if (interval.step, interval.time) in ends)
