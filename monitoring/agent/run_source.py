"""What is known of each run, told by the node of its rank 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from outgrow.monitoring import metrics
from outgrow.monitoring.agent.samples import Sample
from outgrow.monitoring.agent.scan import RunView
from outgrow.monitoring.agent.wall import WallAccount, wall_seconds
from outgrow.monitoring.recording.attempt import AttemptFacts
from outgrow.monitoring.recording.slots import CAUSES, STAGES, STEP_BUCKETS_S
from outgrow.monitoring.recording.stall import median_step_s

SlotValues: TypeAlias = Mapping[str, float]

_SLOTS = (
    (metrics.RUN_START_TIME, "first_start"),
    (metrics.RUN_STEP, "step"),
    (metrics.RUN_EPOCH, "epoch"),
    (metrics.RUN_LAST_STEP_TIME, "last_step_time"),
    (metrics.RUN_STALL_AFTER, "stall_threshold"),
    (metrics.RUN_STEPS, "steps"),
    (metrics.RUN_SAMPLES, "samples"),
    (metrics.RUN_LOSS, "loss"),
    (metrics.RUN_VALIDATION_LOSS, "validation_loss"),
    (metrics.RUN_GRADIENT_NORM, "gradient_norm"),
    (metrics.RUN_LEARNING_RATE, "learning_rate"),
    (metrics.RUN_NONFINITE, "nonfinite"),
    (metrics.RUN_CHECKPOINT_BYTES, "checkpoint_bytes"),
    (metrics.RUN_CHECKPOINT_TIME, "checkpoint_time"),
    (metrics.RUN_EVENTS_DROPPED, "events_dropped"),
)
_LABELLED = (
    *((metrics.RUN_TOKENS, kind, slot) for kind, slot in (("valid", "tokens"), ("padding", "padding"))),
    *((metrics.RUN_CHECKPOINTS, result, f"checkpoints_{result}") for result in ("committed", "failed")),
    *((metrics.RUN_CHECKPOINT_SECONDS, stage, f"checkpoint_s.{stage}") for stage in STAGES),
    *((metrics.RUN_RESTARTS, cause, f"restarts.{cause}") for cause in CAUSES),
)


class RunSource:
    """State, progress, accounts and forecast of every run whose rank 0 is on this node."""

    part = "runs"

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, float], WallAccount] = {}

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        shown = {run.facts.run for run in runs}
        # Kept while rank 0 has no record yet: what was shown before a restart must not fall after it.
        self._accounts = {key: account for key, account in self._accounts.items() if key[0] in shown}
        for run in (run for run in runs if run.tells_the_run):
            yield from _state(run)
            if 0 not in run.ranks:
                continue
            record = run.ranks[0].record
            yield from _counted(run, record)
            # A run that was deleted and begun anew under its name starts from nothing.
            account = self._accounts.setdefault((run.facts.run, record["first_start"]), WallAccount())
            for kind, seconds in account.show(wall_seconds(run.ranks[0])).items():
                yield Sample(metrics.RUN_WALL_SECONDS, (*_labels(run), kind), seconds)
            yield from _timed(run, record)


def _labels(run: RunView) -> tuple[str, str]:
    return run.facts.run, run.facts.host


def _state(run: RunView) -> Iterator[Sample]:
    facts, labels = run.facts, _labels(run)
    about = (facts.name, facts.engine, facts.device, facts.precision, str(facts.world), facts.versions.get("outgrow", ""))
    yield Sample(metrics.RUN_INFO, (*labels, *about), 1)
    for state in metrics.RUN_STATES:
        yield Sample(metrics.RUN_STATE, (*labels, state), run.state == state)
    yield Sample(metrics.RUN_ACTIVE, labels, run.state in metrics.ACTIVE_STATES)
    yield Sample(metrics.RUN_PLANNED_STEPS, labels, facts.steps)
    yield Sample(metrics.RUN_ATTEMPT_START_TIME, labels, facts.started)


def _counted(run: RunView, record: SlotValues) -> Iterator[Sample]:
    labels = _labels(run)
    for metric, slot in _SLOTS:
        yield Sample(metric, labels, record[slot])
    for metric, kind, slot in _LABELLED:
        yield Sample(metric, (*labels, kind), record[slot])
    if run.facts.flops_per_token:
        yield Sample(metrics.RUN_MODEL_FLOPS, labels, record["model_flops"])
    counts = (record[f"step_bucket.{number}"] for number in range(len(STEP_BUCKETS_S) + 1))
    yield Sample(metrics.RUN_STEP_SECONDS, labels, record["step_sum_s"], tuple(itertools.accumulate(counts)))


def _timed(run: RunView, record: SlotValues) -> Iterator[Sample]:
    """What follows from the last steps. Rates and forecasts are of a run that makes steps: they end when it does not."""
    facts, labels = run.facts, _labels(run)
    median_s = median_step_s(record)
    if median_s is None:
        return
    yield Sample(metrics.RUN_STEP_MEDIAN, labels, median_s)
    if facts.checkpoint_every_steps:
        yield Sample(metrics.RUN_CHECKPOINT_INTERVAL, labels, facts.checkpoint_every_steps * median_s)
    if run.state != "running":
        return
    yield Sample(metrics.RUN_TOKENS_PER_SECOND, labels, record["tokens_per_s"])
    for ceiling, ratio in mfu(facts, _flops_per_s(facts, record, median_s), _measured(run)).items():
        yield Sample(metrics.RUN_MFU, (*labels, ceiling), ratio)
    remaining_s = max(0.0, facts.steps - record["step"]) * median_s if record["step"] >= 0 else math.nan
    yield Sample(metrics.RUN_REMAINING_SECONDS, labels, remaining_s)
    if facts.gpu_hour_usd is not None:
        yield Sample(metrics.RUN_REMAINING_DOLLARS, labels, remaining_s / 3600 * facts.gpu_hour_usd * facts.world)


def _flops_per_s(facts: AttemptFacts, record: SlotValues, median_s: float) -> float:
    """Of the whole run, from the valid tokens of an average step and the median time of the last ones; NaN where not known."""
    if not (record["steps"] > 0 and median_s > 0 and facts.flops_per_token > 0):
        return math.nan
    return facts.flops_per_token * record["tokens"] / record["steps"] / median_s


def _measured(run: RunView) -> list[float]:
    """FLOPs a second that the devices of this node's ranks have shown at their start."""
    found = [rank.record["measured_flops"] for rank in run.ranks.values()]
    return [value for value in found if value > 0]


def mfu(facts: AttemptFacts, flops_per_s: float, measured: Sequence[float]) -> dict[str, float]:
    """Share of each known ceiling that the run reaches. Ranks of other nodes count as those of this one are on average."""
    ceilings = {}
    if facts.vendor_flops:
        ceilings["vendor"] = facts.world * facts.vendor_flops
    if measured:
        ceilings["measured"] = facts.world * sum(measured) / len(measured)
    return {name: flops_per_s / ceiling for name, ceiling in ceilings.items()}
