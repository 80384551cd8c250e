"""Batches for one rank: optimizer steps in order from any step on, the same whatever the ranks, workers and restarts before.

``build_loader`` reads training steps, in this process or ahead of time in loader workers; ``build_validation`` the held-out
rows. What a step holds is decided by ``sampler``; here it only becomes tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from outgrow.contracts import Batch, JobSpec, JsonDict, Layout, ShardCounts, StepRows
from outgrow.errors import RunError
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.fetch import index_folder
from outgrow.streaming.lost_shards import LostShard
from outgrow.streaming.packing import PackedRows
from outgrow.streaming.read_ahead import Assignment, Worker, read_ahead_depth
from outgrow.streaming.steps import (
    IndexPlace,
    PackedStep,
    ReadPlan,
    StepReader,
    open_gate,
    validation_reader,
    validation_steps,
)
from outgrow.streaming.tiers import prefetcher
from outgrow.streaming.tiers.gate import Member, Reads
from outgrow.streaming.tiers.reading import open_reading
from outgrow.streaming.tiers.rendezvous import gate_folder


def build_loader(
    job: JobSpec,
    layout: Layout,
    rank: int,
    *,
    start_step: int,
    stop_step: int,
    lost: tuple[LostShard, ...] = (),
    local_world: int = 1,
    attempt: str = "",
) -> TrainingLoader:
    """The steps ``start_step`` to ``stop_step`` (exclusive) of ``rank``; ``data.loader_workers`` processes read ahead.

    Rows that touch a shard of ``lost``, which is the same on every rank, are empty. Where the dataset does not lie on the
    first tier, its shards are fetched shortly before they are needed, by a process that the ``local_world`` ranks of the node
    share in this start of the run, ``attempt``. Raises ``DataError`` where it is nowhere, or the tier has no room;
    ``IntegrityError`` (also later, while iterating) for bytes that differ from their digest, ``ShardError`` where they are of
    a training shard.
    """
    way = _way_of(job, layout, rank, lost, attempt)
    workers = Recipe.model_validate(job.recipe).data.loader_workers
    steps = range(start_step, stop_step)
    if workers == 0 or not steps:
        return _InProcessLoader(job, steps, way, local_world)
    return _ReadAheadLoader(job, steps, way, local_world, num_workers=min(workers, len(steps)))


def build_validation(
    job: JobSpec, layout: Layout, rank: int, *, lost: tuple[LostShard, ...] = (), attempt: str = ""
) -> Validation:
    """Name of the stream and rows of every validation step; iterate as often as needed, the rows are the same every time.

    ``lost`` and ``attempt`` are those of the rank's loader."""
    max_rows = Recipe.model_validate(job.recipe).validation.max_rows
    return Validation(_way_of(job, layout, rank, lost, attempt), max_rows)


def loader_state(job: JobSpec, next_step: int) -> JsonDict:
    """What a checkpoint keeps of the data position: enough to go on, and to refuse other rows.

    Where each stream stands follows from the step; nothing of it is kept.
    """
    return {**_identity(job), "step": next_step, "epoch": _mix(job).phase(next_step).epoch}


def check_state(state: Mapping[str, Any], job: JobSpec) -> int:
    """The step to go on from. Raises ``RunError`` where the checkpoint was trained on other rows."""
    labels = {
        "index_fingerprint": "row index",
        "global_rows": "batch.rows",
        "seed": "run.seed",
        "mix": "a mix of streams (epochs, share, stages)",
    }
    for key, now in _identity(job).items():
        if state.get(key) != now:
            raise RunError(
                f"the checkpoint was made with {labels[key]} {_shown(state.get(key))}, this run has {_shown(now)}",
                hint="the rows of a run cannot change half-way: train --fresh, or init_from its weights",
            )
    return int(state["step"])


class Validation:
    """The held-out rows of one rank; every rank gets the same number of micro-batches in each step."""

    def __init__(self, way: _Way, max_rows: int) -> None:
        self._way = way
        self._gate = open_gate(way.plan)
        self._reader = validation_reader(way.plan, self._gate)
        self._steps = validation_steps(self._reader, max_rows)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[str, StepRows]]:
        with closing(_join(self._way)), closing(self._gate or _InPlace()):
            if self._gate is not None:
                self._gate.acquire_validation()
                self._reader.close_replaced()
            for number, (name, row_ids) in enumerate(self._steps):
                yield name, _to_step_rows(self._reader.read(number, 0, row_ids))


class TrainingLoader(Protocol):
    """``contracts.Loader`` that also tells what fetching its shards has cost."""

    def __iter__(self) -> Iterator[StepRows]: ...
    def state(self, next_step: int) -> JsonDict: ...
    def close(self) -> None: ...
    def shard_counts(self) -> ShardCounts | None:
        """Of all ranks of the node; None where shards are read in place."""


class _InProcessLoader:
    def __init__(self, job: JobSpec, steps: range, way: _Way, local_world: int) -> None:
        self._job = job
        self._steps = steps
        self._next = steps.start
        self._member = _join(way, local_world, self._reads if steps else None)
        self._reader = StepReader(way.plan)

    def __iter__(self) -> Iterator[StepRows]:
        for step in self._steps:
            packed = self._reader.read(step)
            self._next = step + 1
            yield _to_step_rows(packed)

    def state(self, next_step: int) -> JsonDict:
        return loader_state(self._job, next_step)

    def shard_counts(self) -> ShardCounts | None:
        return self._member.counts()

    def close(self) -> None:
        self._reader.close()
        self._member.close()

    def _reads(self) -> Reads:
        return Reads(positions=(self._next,), stop=self._steps.stop)


class _ReadAheadLoader:
    """Worker ``k`` of ``n`` reads every n-th step from the k-th on, so taking turns gives them in order."""

    def __init__(self, job: JobSpec, steps: range, way: _Way, local_world: int, *, num_workers: int) -> None:
        self._job = job
        self._steps = steps
        self._firsts = tuple(steps[:num_workers])
        self.workers: list[Worker] = []
        self._member = _join(way, local_world, self._reads)
        depth = read_ahead_depth(way.plan)
        self.workers = [
            Worker(Assignment(plan=way.plan, number=k, first=first, stop=steps.stop, stride=num_workers), depth=depth)
            for k, first in enumerate(self._firsts)
        ]

    def __iter__(self) -> Iterator[StepRows]:
        """Once only: a step that was taken is gone."""
        for turn, _ in enumerate(self._steps):
            yield _to_step_rows(self.workers[turn % len(self.workers)].take())

    def state(self, next_step: int) -> JsonDict:
        return loader_state(self._job, next_step)

    def shard_counts(self) -> ShardCounts | None:
        return self._member.counts()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []
        self._member.close()

    def _reads(self) -> Reads:
        return Reads(positions=tuple(worker.position for worker in self.workers) or self._firsts, stop=self._steps.stop)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a rank reads; ``assignment`` is what the node's prefetcher is started with, empty where shards are read in place."""

    plan: ReadPlan
    assignment: bytes = field(repr=False)


def _way_of(job: JobSpec, layout: Layout, rank: int, lost: tuple[LostShard, ...], attempt: str) -> _Way:
    """With the dataset, or all of it but its shards, on this node."""
    recipe = Recipe.model_validate(job.recipe)
    reading = open_reading(Site.model_validate(job.site), job.card)
    plan = ReadPlan(
        store=str(reading.store),
        indexes=tuple(
            IndexPlace(folder=str(index_folder(reading.store, job.card, index)), fingerprint=index.fingerprint)
            for index in job.card.indexes
        ),
        mix=_mix(job),
        layout=layout,
        rank=rank,
        seed=recipe.run.seed,
        fill_token=job.card.eos_token_id,
        gate=str(gate_folder(reading.hot, job.run)) if reading.hot else "",
        attempt=attempt,
        lost=lost,
    )
    if reading.hot is None:
        return _Way(plan=plan, assignment=b"")
    told = prefetcher.Assignment(
        run=job.run,
        card=job.card,
        plan=plan,
        max_rows=recipe.validation.max_rows,
        holders=tuple(place.name for place in reading.holders),
        site=job.site,
    )
    return _Way(plan=plan, assignment=told.encode())


class _InPlace:
    """What stands for a ``Member`` where no prefetcher is needed."""

    def counts(self) -> None:
        return None

    def close(self) -> None:
        pass


def _join(way: _Way, local_world: int = 1, reads: Callable[[], Reads] | None = None) -> Member | _InPlace:
    """The rank at its node's prefetcher, which is started if need be."""
    if not way.plan.gate:
        return _InPlace()
    plan = way.plan
    names: dict[str, Any] = {"rank": plan.rank, "attempt": plan.attempt, "local_world": local_world}
    return Member(Path(plan.gate), way.assignment, **names, reads=reads)


def _mix(job: JobSpec) -> Mix:
    return Mix.of(Recipe.model_validate(job.recipe), job.card)


def _identity(job: JobSpec) -> JsonDict:
    recipe = Recipe.model_validate(job.recipe)
    return {
        "index_fingerprint": job.card.indexes[0].fingerprint,  # the mix tells the other lengths, this one all else
        "global_rows": recipe.batch.rows,
        "seed": recipe.run.seed,
        "mix": _mix(job).fingerprint,
    }


def _shown(value: Any) -> str:
    """A value of ``_identity`` for a person: fingerprints shortened."""
    return value[:16] if isinstance(value, str) else str(value)


def _to_step_rows(packed: PackedStep) -> StepRows:
    return StepRows(
        step=packed.step,
        epoch=packed.epoch,
        row_ids=packed.row_ids,
        global_weight=packed.global_weight,
        tokens=packed.tokens,
        micro_batches=tuple(_to_batch(rows) for rows in packed.micro_batches),
    )


def _to_batch(rows: PackedRows) -> Batch:
    """Tensors over the arrays' own memory."""
    return Batch(**{field.name: torch.from_numpy(getattr(rows, field.name)) for field in fields(Batch)})
