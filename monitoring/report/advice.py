"""What stands out in a run, and what to do about it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from outgrow.html_page import short
from outgrow.monitoring.recording.slots import PHASES
from outgrow.monitoring.report.comparison import lowest_validation
from outgrow.monitoring.report.facts import RunFacts, numbers

GOOD_GOODPUT = 0.9
_MOST_DATA_WAIT = 0.05
_MOST_CHECKPOINTING = 0.05
_RISE = 0.01
_MIN_STEPS = 20
"""Shares of time of fewer steps say nothing."""

_LOSSES = {
    "init": "the way to the first step: fewer restarts, a warm cache of compiled kernels, or a longer run",
    "checkpoint": "save less often (checkpoint.every_steps), or to a faster disk",
    "restore": "fewer restarts, or a faster disk",
    "recompute": "steps done twice: save more often (checkpoint.every_steps)",
    "stalled": "waiting for data or for a rank: see the phases, the tiers and outgrow top",
    "idle": "nothing was started: let outgrow train be started again by itself",
}


@dataclass(frozen=True, kw_only=True)
class Advice:
    says: str
    do: str


def advice(run: RunFacts) -> list[Advice]:
    """The most costly first, as far as costs can be told."""
    costs = (*_goodput(run), *_data_wait(run), *_checkpoints(run))
    return [*costs, *_guard(run), *_validation(run), *_forgotten(run), *_nonfinite(run)]


def _goodput(run: RunFacts) -> Iterator[Advice]:
    if not run.accounts or len(run.steps) < _MIN_STEPS or run.accounts[-1].goodput >= GOOD_GOODPUT:
        return
    account = run.accounts[-1]
    lost = {kind: seconds for kind, seconds in account.seconds.items() if kind != "productive"}
    worst = max(lost, key=lambda kind: lost[kind])
    yield Advice(
        says=f"goodput is {account.goodput:.1%}; most of the rest, {lost[worst] / account.wall_s:.1%}, is {worst}",
        do=_LOSSES[worst],
    )


def _data_wait(run: RunFacts) -> Iterator[Advice]:
    seconds = {phase: run.counters.get(f"phase_s.{phase}", 0.0) for phase in PHASES}
    whole = sum(seconds.values())
    if len(run.steps) >= _MIN_STEPS and whole and seconds["data_wait"] > _MOST_DATA_WAIT * whole:
        yield Advice(
            says=f"steps wait for data {seconds['data_wait'] / whole:.1%} of their time",
            do="more loader workers (data.loader_workers), or a faster first tier",
        )


def _checkpoints(run: RunFacts) -> Iterator[Advice]:
    failed = [own for own in run.saves if own.error]
    if failed:
        last = max(own.step for own in failed)
        healed = any(not own.error and own.step > last for own in run.saves)
        yield Advice(
            says=f"{len(failed):,} checkpoint{'s' * (len(failed) != 1)} failed, the last at step {last:,}"
            + (", and later ones were committed" if healed else ""),
            do="see what went wrong under Checkpoints; the run would go on from the last committed one",
        )
    if run.accounts and len(run.steps) >= _MIN_STEPS:
        share = run.accounts[-1].seconds.get("checkpoint", 0.0) / max(run.accounts[-1].wall_s, 1e-9)
        if share > _MOST_CHECKPOINTING:
            yield Advice(says=f"checkpoints hold up the loop {share:.1%} of the time", do=_LOSSES["checkpoint"])


def _validation(run: RunFacts) -> Iterator[Advice]:
    lowest = lowest_validation(run)
    last = run.validations[-1].loss if run.validations else None
    if lowest is None or last is None or not math.isfinite(last) or last <= (1 + _RISE) * lowest:
        return
    at = next(own.step for own in run.validations if own.loss == lowest)
    yield Advice(
        says=f"the validation loss has risen from {lowest:.4f} at step {at:,} to {last:.4f}",
        do="export the best checkpoint (outgrow export --best), train shorter, or on more data",
    )


def _guard(run: RunFacts) -> Iterator[Advice]:
    """What the run itself has done about a loss that rose."""
    for back in run.roll_backs:
        given = numbers(back.detail)
        yield Advice(
            says=f"the run went back from step {given.get('from_step', 0):,.0f} to {back.step:,}: {back.detail.get('why', '')}",
            do=f"nothing: it went on at {given.get('rate', 1):g} of the learning rate; lower it from the start next time",
        )
    if run.last is not None and run.last.kind == "end" and (why := run.last.detail.get("ended")):
        yield Advice(
            says=f"the run ended early, at step {run.last.step:,}: {why}",
            do="export the best checkpoint (outgrow export --best), or change validation.on_rise and run it again",
        )


def _forgotten(run: RunFacts) -> Iterator[Advice]:
    """General sets, which are measured and not trained on, that the model has become worse at."""
    streams = run.stored.recipe.get("data", {}).get("streams", ())
    for name in [stream["name"] for stream in streams if stream.get("use") == "validation"]:
        measured = [numbers(own.detail.get("streams")).get(name) for own in run.validations]
        known = [loss for loss in measured if loss is not None]
        if known and known[-1] > (1 + _RISE) * known[0]:
            yield Advice(
                says=f"the model is losing '{name}', which it is not trained on: a loss of {known[0]:.4f} at first, "
                f"{known[-1]:.4f} now",
                do="mix such text into the training (a stream with a share), lower the learning rate, or train an adapter",
            )


def _nonfinite(run: RunFacts) -> Iterator[Advice]:
    found = run.counters.get("nonfinite", 0.0)
    if found:
        yield Advice(
            says=f"{short(found).strip()} step(s) had a loss or gradient that was not finite",
            do="lower optimizer.learning_rate or optimizer.clip_norm",
        )
