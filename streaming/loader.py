"""Batches for one rank: optimizer steps in order from any step on, the same whatever the ranks, workers and restarts before.

``build_loader`` reads training steps, in this process or ahead of time in loader workers; ``build_validation`` the held-out
rows. What a step holds is decided by ``sampler``; here it only becomes tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch

from outgrow.contracts import Batch, JobSpec, JsonDict, Layout, Loader, StepRows
from outgrow.errors import RunError
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.fetch import index_folder, local_dataset
from outgrow.streaming.packing import PackedRows
from outgrow.streaming.read_ahead import Assignment, Worker, read_ahead_depth
from outgrow.streaming.steps import (
    IndexPlace,
    PackedStep,
    ReadPlan,
    SplitReader,
    StepReader,
    validation_reader,
    validation_steps,
)


def build_loader(job: JobSpec, layout: Layout, rank: int, *, start_step: int, stop_step: int) -> Loader:
    """The steps ``start_step`` to ``stop_step`` (exclusive) of ``rank``; ``data.loader_workers`` processes read ahead.

    The dataset is fetched first where the site's storage is remote. Raises ``DataError`` where it is not there,
    ``IntegrityError`` (also later, while iterating) for bytes that differ from their digest.
    """
    plan = read_plan(job, layout, rank)
    workers = Recipe.model_validate(job.recipe).data.loader_workers
    steps = range(start_step, stop_step)
    if workers == 0:
        return _InProcessLoader(job, steps, StepReader(plan))
    depth = read_ahead_depth(plan)
    return _ReadAheadLoader(job, steps, plan, num_workers=min(workers, len(steps)), depth=depth)


def build_validation(job: JobSpec, layout: Layout, rank: int) -> Validation:
    """Name of the stream and rows of every validation step; iterate as often as needed, the rows are the same every time."""
    max_rows = Recipe.model_validate(job.recipe).validation.max_rows
    return Validation(validation_reader(read_plan(job, layout, rank)), max_rows)


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

    def __init__(self, reader: SplitReader, max_rows: int) -> None:
        self._reader = reader
        self._steps = validation_steps(reader, max_rows)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[str, StepRows]]:
        for number, (name, row_ids) in enumerate(self._steps):
            yield name, _to_step_rows(self._reader.read(number, 0, row_ids))


class _InProcessLoader:
    def __init__(self, job: JobSpec, steps: range, reader: StepReader) -> None:
        self._job = job
        self._steps = steps
        self._reader = reader

    def __iter__(self) -> Iterator[StepRows]:
        for step in self._steps:
            yield _to_step_rows(self._reader.read(step))

    def state(self, next_step: int) -> JsonDict:
        return loader_state(self._job, next_step)

    def close(self) -> None:
        """Nothing runs in the background."""


class _ReadAheadLoader:
    """Worker ``k`` of ``n`` reads every n-th step from the k-th on, so taking turns gives them in order."""

    def __init__(self, job: JobSpec, steps: range, plan: ReadPlan, *, num_workers: int, depth: int) -> None:
        self._job = job
        self._steps = steps
        self.workers = [
            Worker(Assignment(plan=plan, first=steps.start + k, stop=steps.stop, stride=num_workers), depth=depth)
            for k in range(num_workers)
        ]

    def __iter__(self) -> Iterator[StepRows]:
        """Once only: a step that was taken is gone."""
        for turn, _ in enumerate(self._steps):
            yield _to_step_rows(self.workers[turn % len(self.workers)].take())

    def state(self, next_step: int) -> JsonDict:
        return loader_state(self._job, next_step)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []


def read_plan(job: JobSpec, layout: Layout, rank: int) -> ReadPlan:
    """Where a rank reads what, with the dataset on this node."""
    store = local_dataset(Site.model_validate(job.site), job.card)
    return ReadPlan(
        store=str(store),
        indexes=tuple(
            IndexPlace(folder=str(index_folder(store, job.card, index)), fingerprint=index.fingerprint)
            for index in job.card.indexes
        ),
        mix=_mix(job),
        layout=layout,
        rank=rank,
        seed=Recipe.model_validate(job.recipe).run.seed,
        fill_token=job.card.eos_token_id,
    )


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
