"""What ``outgrow top`` shows of a run, as values: worked out from the agents' answers and the end of its records. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outgrow.contracts import JsonDict, ShardCounts, StepRecord
from outgrow.monitoring.recording.slots import PHASES, WALL
from outgrow.monitoring.recording.stall import median_step_s
from outgrow.monitoring.top.agents import Answers, Rank, Told

_WORST_FIRST = ("failed", "lost", "stalled", "interrupted", "restarting")
"""What the agent of any node sees of these, the whole run is."""
_MIN_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class RankLine:
    """``doing`` says what the rank's open interval is, ``silent_s`` how long ago it gave its last sign; ``behind`` counts the
    steps that others are ahead of it; ``memory_bytes`` are the device's reserved ones."""

    rank: int
    host: str
    alive: bool
    doing: str
    step: int | None
    behind: int
    loss: float | None
    memory_bytes: float | None
    silent_s: float | None


@dataclass(frozen=True, kw_only=True)
class View:
    """Numbers are None where they are not known. ``phases`` are shares of the time of the last logged steps, ``goodput`` of all
    the time. ``notes`` say where this is from and who is silent."""

    run: str
    state: str
    step: int
    steps: int
    epoch: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    learning_rate: float | None
    gradient_norm: float | None
    tokens_per_s: float | None
    mfu: Mapping[str, float]
    remaining_s: float | None
    remaining_usd: float | None
    wall_s: float | None
    goodput: float | None
    restarts: int | None
    phases: Mapping[str, float]
    ranks: tuple[RankLine, ...]
    shards: ShardCounts | None
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    events: tuple[StepRecord, ...]
    notes: tuple[str, ...]


def view(
    run: str,
    owner: str,
    newest: Mapping[str, StepRecord],
    last: StepRecord | None,
    steps: Sequence[StepRecord],
    events: Iterable[StepRecord],
    answers: Answers,
    now: float,
) -> View:
    """The run at the Unix time ``now``. ``owner`` is the process that runs it now, else empty; ``newest`` are the newest
    records by kind, ``steps`` the last logged ones of this start."""
    told = answers.told
    facts = told[0].facts if told else _dict(newest["start"].detail.get("facts")) if "start" in newest else {}
    first = next((rank for own in told for rank in own.ranks if rank.rank == 0), None)
    record: Mapping[str, float] = first.record if first else {}
    logged, start = newest.get("step"), newest.get("start")
    going = bool(owner) or any(own.state in ("running", "starting") for own in told)
    step = _first(record.get("step"), last.step if last else None) or 0
    planned = _first(facts.get("steps"), last.steps if last else None) or 0
    speed = _first(record.get("tokens_per_s"), logged.tokens_per_s if logged else None)
    remaining_s = _remaining(record, logged, planned - step) if going else None
    wall = _wall(record, newest)
    price = _first(facts.get("gpu_hour_usd"))
    world = _first(facts.get("world"), start.detail.get("world") if start else None) or 1
    return View(
        run=run,
        state=_state(told, owner, last),
        step=int(step),
        steps=int(planned),
        epoch=int(_first(record.get("epoch"), last.epoch if last else None) or 0),
        tokens=last.tokens if last else 0,
        loss=_first(record.get("loss"), logged.loss if logged else None),
        validation_loss=_first(record.get("validation_loss"), newest["validation"].loss if "validation" in newest else None),
        learning_rate=_first(record.get("learning_rate"), logged.learning_rate if logged else None),
        gradient_norm=_first(record.get("gradient_norm"), logged.grad_norm if logged else None),
        tokens_per_s=speed,
        mfu=_mfu(facts, speed, [rank for own in told for rank in own.ranks]),
        remaining_s=remaining_s,
        remaining_usd=remaining_s / 3600 * price * world if remaining_s is not None and price is not None else None,
        wall_s=sum(wall.values()) if wall else None,
        goodput=wall.get("productive", 0.0) / sum(wall.values()) if sum(wall.values()) else None,
        restarts=_restarts(record, newest),
        phases=_phases(steps),
        ranks=_rank_lines([rank for own in told for rank in own.ranks], now),
        shards=_shards(newest),
        checkpoint_step=_saved_step(events := tuple(events), newest),
        checkpoint_age_s=_saved_age(record, newest, now),
        events=events,
        notes=_notes(answers, told, last, now),
    )


def _first(*values: Any) -> float | None:
    """The first that is a finite number."""
    return next((float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)), None)


def _dict(value: Any) -> JsonDict:
    return value if isinstance(value, dict) else {}


def _state(told: Sequence[Told], owner: str, last: StepRecord | None) -> str:
    """The worst that any node sees, else what rank 0's node says, else what the records and the run's lock tell."""
    states = [own.state for own in told]
    worst = next((state for state in _WORST_FIRST if state in states), None)
    if worst:
        # Whoever started them is there still, and starts them again: a run has failed when that has given up.
        return "restarting" if worst == "failed" and owner else worst
    first = next((own.state for own in told if any(rank.rank == 0 for rank in own.ranks)), None)
    if first or states:
        return first or states[0]
    if owner:
        return "running" if last is not None and last.kind != "end" else "starting"
    if last is None:
        return "not started"
    return "finished" if last.kind == "end" else "stopped"


def _remaining(record: Mapping[str, float], logged: StepRecord | None, steps: float) -> float | None:
    """Seconds to the last step, at the median of the last ones."""
    median_s = median_step_s(record) if record else None
    pace = _first(median_s, logged.step_s if logged else None)
    return max(0.0, steps) * pace if pace is not None else None


def _counters(newest: Mapping[str, StepRecord]) -> dict[str, float]:
    """Those of the newest record that has any."""
    carrying = [own for own in newest.values() if own.detail.get("counters")]
    found = max(carrying, key=lambda own: own.time, default=None)
    return _dict(found.detail["counters"]) if found else {}


def _wall(record: Mapping[str, float], newest: Mapping[str, StepRecord]) -> dict[str, float]:
    counters = record or _counters(newest)
    found = {kind: _first(counters.get(f"wall_s.{kind}")) for kind in WALL}
    return {kind: seconds for kind, seconds in found.items() if seconds is not None}


def _restarts(record: Mapping[str, float], newest: Mapping[str, StepRecord]) -> int | None:
    counters = record or _counters(newest)
    found = [value for name, value in counters.items() if name.startswith("restarts.") and math.isfinite(value)]
    return int(sum(found)) if found else None


def _phases(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Shares of the time between the first and the last of ``steps``; empty where they do not tell."""
    told = [own.detail["counters"] for own in steps if isinstance(own.detail.get("counters"), dict)]
    if len(told) < _MIN_STEPS:
        return {}
    grown = {phase: told[-1].get(f"phase_s.{phase}", 0.0) - told[0].get(f"phase_s.{phase}", 0.0) for phase in PHASES}
    whole = sum(grown.values())
    return {phase: seconds / whole for phase, seconds in grown.items() if seconds > 0} if whole > 0 else {}


def _mfu(facts: Mapping[str, Any], speed: float | None, ranks: Sequence[Rank]) -> dict[str, float]:
    """Share of each known ceiling; ranks that are not heard of count as the others on average."""
    flops_per_token, world = _first(facts.get("flops_per_token")), _first(facts.get("world"))
    if speed is None or not flops_per_token or not world:
        return {}
    vendor = _first(facts.get("vendor_flops"))
    measured = [found for rank in ranks if (found := _first(rank.record.get("measured_flops")))]
    ceilings = {"vendor": vendor, "measured": sum(measured) / len(measured) if measured else None}
    return {name: speed * flops_per_token / (world * one) for name, one in ceilings.items() if one}


def _rank_lines(ranks: Sequence[Rank], now: float) -> tuple[RankLine, ...]:
    furthest = max((step for rank in ranks if (step := _first(rank.record.get("step"))) is not None), default=0.0)
    return tuple(_rank_line(rank, furthest, now) for rank in sorted(ranks, key=lambda own: own.rank))


def _rank_line(rank: Rank, furthest: float, now: float) -> RankLine:
    record = rank.record
    step, kind = _first(record.get("step")), _first(record.get("open_kind"))
    doing = (
        "step" if record.get("stepping") == 1 else WALL[int(kind)] if kind is not None and 0 <= kind < len(WALL) else "ended"
    )
    touched = _first(record.get("touched"))
    return RankLine(
        rank=rank.rank,
        host=rank.host,
        alive=rank.alive,
        doing=doing if rank.alive else "gone" if doing != "ended" else doing,
        step=None if step is None else int(step),
        behind=0 if step is None else int(furthest - step),
        loss=_first(record.get("rank_loss")),
        memory_bytes=_first(record.get("memory_reserved")),
        silent_s=None if touched is None else max(0.0, now - touched),
    )


def _shards(newest: Mapping[str, StepRecord]) -> ShardCounts | None:
    carrying = [own for own in newest.values() if own.detail.get("shards")]
    found = max(carrying, key=lambda own: own.time, default=None)
    try:
        return ShardCounts.from_dict(found.detail["shards"]) if found else None
    except (TypeError, KeyError, AttributeError):  # of another version of outgrow
        return None


def _saved_step(events: Sequence[StepRecord], newest: Mapping[str, StepRecord]) -> int | None:
    """The step of the last checkpoint that was committed, as far as it is among the last events."""
    saves = [own for own in (*events, *newest.values()) if own.kind == "checkpoint" and not own.detail.get("error")]
    found = max(saves, key=lambda own: own.time, default=None)
    return int(_first(found.detail.get("step"), found.step) or 0) if found else None


def _saved_age(record: Mapping[str, float], newest: Mapping[str, StepRecord], now: float) -> float | None:
    saved = newest.get("checkpoint")
    told = saved.time if saved and not saved.detail.get("error") else None
    when = _first(record.get("checkpoint_time"), told)
    return None if when is None else max(0.0, now - when)


def _notes(answers: Answers, told: Sequence[Told], last: StepRecord | None, now: float) -> tuple[str, ...]:
    hosts = sorted({str(own.facts.get("host", "")) for own in told})
    sources = [f"from the agent{'s' * (len(hosts) > 1)} on {', '.join(hosts)}"] if hosts else []
    if not hosts:
        age = f", the last of {now - last.time:,.0f} s ago" if last else ""
        sources = [f"from the run's records alone{age}"]
    return (*sources, *answers.silent)
