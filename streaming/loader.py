"""Batches for one rank: optimizer steps in order from any step on, the same whatever the ranks, workers and restarts before.

``build_loader`` reads training steps, in this process or ahead of time in loader workers; ``build_validation`` the held-out
rows. What a step holds is decided by ``sampler``; here it only becomes tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from typing import Any

import torch

from outgrow.contracts import Batch, JobSpec, JsonDict, Layout, Loader, ShardCounts, StepRows
from outgrow.errors import RunError
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.streaming.access import Access, InPlace, open_access
from outgrow.streaming.lost_shards import LostShard
from outgrow.streaming.packing import PackedRows
from outgrow.streaming.read_ahead import Assignment, Worker, read_ahead_depth
from outgrow.streaming.steps import PackedStep, StepReader, open_gate, validation_reader, validation_steps
from outgrow.streaming.tiers.gate import Reads


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
) -> Loader:
    """The steps ``start_step`` to ``stop_step`` (exclusive) of ``rank``; ``data.loader_workers`` processes read ahead.

    Rows that touch a shard of ``lost``, which is the same on every rank, are empty. Where the dataset does not lie on the
    first tier, its shards are fetched shortly before they are needed, by a process that the ``local_world`` ranks of the node
    share in this start of the run, ``attempt``. Raises ``DataError`` where it is nowhere, or the tier has no room;
    ``IntegrityError`` (also later, while iterating) for bytes that differ from their digest, ``ShardError`` where they are of
    a training shard.
    """
    access = open_access(job, layout, rank, lost=lost, attempt=attempt)
    workers = Recipe.model_validate(job.recipe).data.loader_workers
    steps = range(start_step, stop_step)
    if workers == 0 or not steps:
        return _InProcessLoader(job, steps, access, local_world)
    return _ReadAheadLoader(job, steps, access, local_world, num_workers=min(workers, len(steps)))


def build_validation(
    job: JobSpec, layout: Layout, rank: int, *, lost: tuple[LostShard, ...] = (), attempt: str = ""
) -> Validation:
    """Name of the stream and rows of every validation step; iterate as often as needed, the rows are the same every time.

    ``lost`` and ``attempt`` are those of the rank's loader."""
    max_rows = Recipe.model_validate(job.recipe).validation.max_rows
    return Validation(open_access(job, layout, rank, lost=lost, attempt=attempt), max_rows)


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

    def __init__(self, access: Access, max_rows: int) -> None:
        self._access = access
        self._gate = open_gate(access.plan)
        self._reader = validation_reader(access.plan, self._gate)
        self._steps = validation_steps(self._reader, max_rows)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[str, StepRows]]:
        with closing(self._access.join()), closing(self._gate or InPlace()):
            if self._gate is not None:
                self._gate.acquire_validation()
                self._reader.close_replaced()
            for number, (name, row_ids) in enumerate(self._steps):
                yield name, _to_step_rows(self._reader.read(number, 0, row_ids))


class _InProcessLoader:
    def __init__(self, job: JobSpec, steps: range, access: Access, local_world: int) -> None:
        self._job = job
        self._steps = steps
        self._next = steps.start
        self._reader = StepReader(access.plan)
        self._member = access.join(local_world, self._reads if steps else None)

    def __iter__(self) -> Iterator[StepRows]:
        for step in self._steps:
            packed = self._reader.read(step)
            self._next = step + 1
            yield _to_step_rows(packed)

    def state(self, next_step: int) -> JsonDict:
        return loader_state(self._job, next_step)

    def shard_counts(self) -> ShardCounts | None:
        return self._member.counts()

    def shard_counts_file(self) -> str:
        return self._member.counts_file

    def ready_steps(self) -> None:
        """None are read ahead."""

    def close(self) -> None:
        self._reader.close()
        self._member.close()

    def _reads(self) -> Reads:
        return Reads(positions=(self._next,), stop=self._steps.stop)


class _ReadAheadLoader:
    """Worker ``k`` of ``n`` reads every n-th step from the k-th on, so taking turns gives them in order."""

    def __init__(self, job: JobSpec, steps: range, access: Access, local_world: int, *, num_workers: int) -> None:
        self._job = job
        self._steps = steps
        self._firsts = tuple(steps[:num_workers])
        self.workers: list[Worker] = []
        self._member = access.join(local_world, self._reads)
        depth = read_ahead_depth(access.plan)
        self.workers = [
            Worker(Assignment(plan=access.plan, number=k, first=first, stop=steps.stop, stride=num_workers), depth=depth)
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

    def shard_counts_file(self) -> str:
        return self._member.counts_file

    def ready_steps(self) -> int:
        return sum(worker.ready for worker in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []
        self._member.close()

    def _reads(self) -> Reads:
        return Reads(positions=tuple(worker.position for worker in self.workers) or self._firsts, stop=self._steps.stop)


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
