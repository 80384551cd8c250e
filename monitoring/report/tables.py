"""The tables of a run's report: the figures behind its plots, each as text for a person."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from outgrow.contracts import StepRecord
from outgrow.html_page import Table, short, visible
from outgrow.monitoring.live import duration
from outgrow.monitoring.recording.slots import PHASES, WALL
from outgrow.monitoring.report.comparison import goodput_text, loss_text, lowest_validation, speed_text
from outgrow.monitoring.report.curves import evenly
from outgrow.monitoring.report.facts import RunFacts, number, numbers
from outgrow.monitoring.report.plots import cause

NONE = "—"
SHOWN_SAVES = 15
SHOWN_FAILURES = 20
SHOWN_STARTS = 60
SHOWN_TEXTS = 8
"""Continuations of a prompt that are shown, from the first validation to the last."""
_ERROR_CHARS = 300


def tiles(run: RunFacts) -> list[tuple[str, str]]:
    last, account = run.last, run.accounts[-1] if run.accounts else None
    return [
        (f"{last.step:,}" if last else "0", f"of {last.steps:,} steps" if last else "steps"),
        (loss_text(run.steps[-1].loss if run.steps else None), "training loss, nats a token"),
        (loss_text(run.validations[-1].loss if run.validations else None), _validation_note(run)),
        (short(last.tokens).strip() if last else "0", "tokens learned from"),
        (speed_text(run), "tokens/s, median"),
        (goodput_text(run), "goodput"),
        (duration(account.wall_s) if account else NONE, _wall_note(run)),
    ]


def _validation_note(run: RunFacts) -> str:
    lowest = lowest_validation(run)
    return "validation loss" if lowest is None else f"validation loss; lowest {lowest:.4f}"


def _wall_note(run: RunFacts) -> str:
    """With what the time has cost, where that is known."""
    if not run.accounts or not run.starts:
        return "wall time"
    facts = run.starts[-1].facts
    price = number(facts.get("gpu_hour_usd")) * number(facts.get("world"))
    return "wall time" if math.isnan(price) else f"wall time; ${price * run.accounts[-1].wall_s / 3600:,.2f}"


def phases(run: RunFacts) -> Table:
    seconds = {phase: run.counters.get(f"phase_s.{phase}", 0.0) for phase in PHASES}
    return _shares("phase", {phase: value for phase, value in seconds.items() if value})


def wall(run: RunFacts) -> Table:
    seconds = run.accounts[-1].seconds if run.accounts else {}
    return _shares("kind", {kind: seconds[kind] for kind in WALL if seconds.get(kind)})


def _shares(title: str, seconds: dict[str, float]) -> Table:
    whole = sum(seconds.values())
    rows = [(name, f"{value:,.1f}", f"{value / whole:.1%}") for name, value in seconds.items()]
    return [(title, "seconds", "share"), *rows]


def memory(run: RunFacts) -> Table:
    """The most of each kind, and the last."""
    rows: Table = [("memory", "most", "last")]
    found = [numbers(own.detail.get("memory")) for own in run.steps]
    for kind in dict.fromkeys(kind for own in found for kind in own):
        values = [own[kind] for own in found if kind in own]
        rows.append((visible(kind), f"{short(max(values))}B", f"{short(values[-1])}B"))
    return rows


def tiers(run: RunFacts) -> Table:
    rows: Table = [("tier", "shards", "bytes read", "seconds", "MB/s", "errors")]
    for name, own in (run.shards.tiers if run.shards else {}).items():
        speed = f"{own.bytes / own.read_s / 1e6:,.1f}" if own.read_s else NONE
        errors = ", ".join(f"{count:,} {visible(kind)}" for kind, count in own.errors.items()) or "none"
        rows.append((visible(name), f"{own.shards:,}", f"{short(own.bytes)}B", f"{own.read_s:,.1f}", speed, errors))
    return rows


def cache(run: RunFacts) -> Table:
    counts = run.shards
    if counts is None:
        return [("", "")]
    hits = f" ({counts.hits / counts.visits:.1%})" if counts.visits else ""
    return [
        ("visits", "hits", "fetched", "fetched again", "evicted", "healed", "read through", "waited"),
        (
            f"{counts.visits:,}",
            f"{counts.hits:,}{hits}",
            f"{counts.fetches:,}",
            f"{counts.refetches:,}",
            f"{counts.evictions:,}",
            f"{counts.healed:,}",
            f"{counts.read_through:,}",
            f"{counts.wait_s:,.1f} s",
        ),
    ]


def saves(run: RunFacts) -> Table:
    rows: Table = [("step", "size", "copy", "write", "commit", "what went wrong")]
    failed = [own for own in run.saves if own.error][-SHOWN_FAILURES:]
    whole = [own for own in run.saves if not own.error][-SHOWN_SAVES:]
    for own in sorted([*failed, *whole], key=lambda save: save.time):
        stages = (f"{seconds:,.2f} s" for seconds in (own.copy_s, own.write_s, own.commit_s))
        size = NONE if own.error else f"{short(own.bytes)}B"
        rows.append((f"{own.step:,}", size, *stages, visible(own.error[:_ERROR_CHARS])))
    return rows


def saves_note(run: RunFacts) -> str:
    failed = sum(1 for own in run.saves if own.error)
    whole = [own for own in run.saves if not own.error]
    paused = sum(own.copy_s for own in run.saves)
    kept = f" What is kept takes {short(run.stored_bytes)}B." if run.stored_bytes else ""
    return (
        f"{len(whole):,} committed with {short(sum(own.bytes for own in whole))}B, {failed:,} failed; the loop has waited "
        f"{paused:,.1f} s for them.{kept} Listed are the last {SHOWN_SAVES}, and failures."
    )


def starts(run: RunFacts) -> Table:
    rows: Table = [("when (UTC)", "cause", "from step", "ranks", "steps lost", "away")]
    for place, start in list(enumerate(run.starts))[-SHOWN_STARTS:]:
        why = "first start" if place == 0 and not start.cause else visible(cause(start.cause))
        why = "not said" if why == "restart" else why
        world = f"{start.world:,}" if start.world else NONE
        away = duration(start.away_s) if place else NONE
        rows.append((when(start.time), why, f"{start.step:,}", world, f"{start.undone_steps:,}" if place else NONE, away))
    return rows


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def plan(run: RunFacts) -> Table:
    """What was planned, and what came of it."""
    planned, last = run.plan or {}, run.last
    biggest = max((own.bytes for own in run.saves), default=0)
    ranks = run.starts[-1].world if run.starts else 0
    rows = [
        ("steps", _count(planned.get("steps")), f"{last.step:,}" if last else NONE),
        ("tokens", _amount(planned.get("tokens")), _amount(last.tokens if last else None)),
        ("ranks", _count(planned.get("workers")), _count(ranks or None)),
        ("bytes of a checkpoint", _bytes(planned.get("checkpoint_bytes")), _bytes(biggest or None)),
        ("bytes of all that is kept", _bytes(planned.get("run_bytes")), _bytes(run.stored_bytes or None)),
        ("time", NONE, duration(run.accounts[-1].wall_s) if run.accounts else NONE),
        ("time to the end", NONE, remaining(run)),
    ]
    return [("", "planned", "so far" if not run.last or run.last.kind != "end" else "in the end"), *rows]


def remaining(run: RunFacts) -> str:
    """At the pace of the last logged steps."""
    recent: Sequence[StepRecord] = [own for own in run.steps[-20:] if own.step_s]
    if run.last is None or not recent or run.last.kind == "end":
        return NONE
    pace = sum(own.step_s or 0.0 for own in recent) / len(recent)
    return duration((run.last.steps - run.last.step) * pace)


def _count(value: Any) -> str:
    found = number(value)
    return NONE if math.isnan(found) else f"{found:,.0f}"


def _amount(value: Any) -> str:
    found = number(value)
    return NONE if math.isnan(found) else short(found).strip()


def _bytes(value: Any) -> str:
    found = number(value)
    return NONE if math.isnan(found) else f"{short(found)}B"


def samples(run: RunFacts) -> list[dict[str, Any]]:
    """Each prompt with what the model made of it along the way: (step, text), the first and the last among them."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for record in run.validations:
        found = record.detail.get("samples")
        for own in found if isinstance(found, list) else []:
            if isinstance(own, dict):
                problem = own.get("problem")
                text = f"not continued: {problem}" if problem else str(own.get("text", ""))
                texts.setdefault(str(own.get("prompt", "")), []).append((record.step, text))
    return [
        {
            "prompt": visible(prompt),
            "texts": [(f"step {made[at][0]:,}", visible(made[at][1])) for at in evenly(len(made), SHOWN_TEXTS)],
        }
        for prompt, made in texts.items()
    ]


def versions(run: RunFacts) -> Table:
    """Of every start, the newest last; a column for each."""
    rows: Table = [("what", "is")]
    if not run.starts:
        return rows
    start = run.starts[-1]
    facts, own = start.facts, start.facts.get("versions")
    found: dict[str, Any] = {name: start.detail[name] for name in ("torch", "transformers") if name in start.detail}
    found |= own if isinstance(own, dict) else {}
    named = {key: facts.get(key) for key in ("engine", "device_name", "precision", "parameters", "host") if facts.get(key)}
    layout = start.detail.get("layout")
    if "engine" not in named and isinstance(layout, dict):
        named = {"engine": layout.get("engine")} | named
    device = {"device": start.device} if start.device else {}
    for name, value in {**device, **named, **found}.items():
        rows.append((name.replace("_", " "), visible(f"{value:,}" if isinstance(value, int) else str(value))))
    return rows
