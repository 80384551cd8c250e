"""Training on one rank, from the job to the result: what every worker of a run does, top-down.

A step reads no number from the device. Losses are read where something is done with them: to be logged, before a
validation, and before a checkpoint, which is never made of weights that a non-finite gradient has touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import CheckpointRef, Context, JobSpec, Layout, Loader, StepRows, WorkerResult
from outgrow.errors import IntegrityError, ShardError, TrainingError
from outgrow.recipes.layout import resolve, total_steps
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.bring_up import Started, prepare_process, start_engine, step_seed
from outgrow.trainers.checkpoint.catalog import newest, survey
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.format import step_folder
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.checkpoint.resume import gather_texts
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.engines import Engine, StepSums
from outgrow.trainers.finite import FiniteWatch
from outgrow.trainers.pace import Pace
from outgrow.trainers.progress import Progress
from outgrow.trainers.records import Records
from outgrow.trainers.saves import Saves
from outgrow.trainers.schedule import learning_rate
from outgrow.trainers.validation import validate

if TYPE_CHECKING:
    from outgrow.streaming.lost_shards import LostShard


@dataclass(frozen=True)
class _Run:
    """All that a step needs, on one rank."""

    job: JobSpec
    recipe: Recipe
    rank: int
    steps: int
    storage: Storage
    engine: Engine
    loader: Loader
    validation: Iterable[tuple[str, StepRows]]
    saves: Saves
    records: Records
    progress: Progress
    watch: FiniteWatch
    pace: Pace


def train_worker(job: JobSpec, context: Context) -> WorkerResult:
    """The end of the run on this rank, after training it from its newest checkpoint, or from the start, to its last step.

    A run that has come to its last step already returns at once. Raises ``TrainingError`` for a gradient that is not
    finite and for a last checkpoint that cannot be written, ``RestartError`` where the run has given up a shard; what the
    parts raise (``UserError``, ``IntegrityError``) passes through.
    """
    from outgrow.streaming.quarantine import answer

    recipe = Recipe.model_validate(job.recipe)
    storage = Site.model_validate(job.site).open_storage()
    steps = total_steps(recipe, Mix.of(recipe, job.card))
    with closing(Records(context, storage, job.run.folder, steps)) as records:
        if finished := _finished(storage, job.run.folder, steps, context.rank):
            records.say("end", finished, loss=finished.validation_loss)
            return finished.result(step_folder(job.run.folder, finished.step))
        device = prepare_process(job, recipe, context.local_rank)
        layout = resolve(recipe, context.world, context.local_world)
        started = start_engine(job, recipe, layout, storage, device)
        lost = _lost_shards(storage, job.run.folder, context.rank)
        records.say("start", started.progress, detail=_versions_and_layout(layout, device, started) | _named(lost))
        group = Group(job.run.folder, context.attempt, context.rank, context.world)
        step = started.progress.step
        with (
            closing(_saves(recipe, storage, group, started, device)) as saves,
            closing(_open_loader(job, context, layout, range(step, steps), lost)) as loader,
        ):
            run = _Run(
                job=job,
                recipe=recipe,
                rank=context.rank,
                steps=steps,
                storage=storage,
                engine=started.engine,
                loader=loader,
                validation=_open_validation(job, context, layout, lost) if job.card.validation_rows else (),
                saves=saves,
                records=records,
                progress=started.progress,
                watch=FiniteWatch(device),
                pace=Pace(),
            )
            try:
                _train(run)
            except ShardError as error:
                raise answer(error, job, lost) from error
        return run.progress.result(step_folder(job.run.folder, steps))


def _train(run: _Run) -> None:
    """Every step that is left, each with what is due after it."""
    engine, recipe = run.engine, run.recipe
    for rows in run.pace.steps(run.loader):
        torch.manual_seed(step_seed(recipe.run.seed, rows.step, run.rank))
        # A step of prompts alone learns nothing: its loss is 0 then, not 0 / 0.
        global_weight = rows.global_weight or 1.0
        for batch in rows.micro_batches:
            engine.accumulate(batch, global_weight)
        sums = engine.finish()
        rate = learning_rate(recipe, rows.step, run.steps)
        engine.apply(rate)
        run.progress.advance(rows)
        run.watch.see(run.progress.step, sums.grad_norm)
        _do_what_is_due(run, sums, rate)
    counts = run.loader.shard_counts()
    detail = {"shards": counts.to_dict()} if counts else {}
    run.records.say("end", run.progress, loss=run.progress.validation_loss, detail=detail)


def _do_what_is_due(run: _Run, sums: StepSums, rate: float) -> None:
    """Log, validate, save: in this order, each where its turn has come and all after the last step."""
    step, last = run.progress.step, run.progress.step == run.steps
    logging = last or step % run.recipe.logging.every_steps == 0
    every_steps = run.recipe.validation.every_steps
    validating = last or (every_steps > 0 and step % every_steps == 0)
    saving = last or run.saves.due(step)
    if not (logging or validating or saving):
        return
    loss, grad_norm = _read(run, sums)
    if logging:
        speed = run.pace.look()
        run.records.say("step", run.progress, loss=loss, grad_norm=grad_norm, learning_rate=rate, **vars(speed))
    with run.pace.paused():
        validation_loss = _validate(run) if validating else None
        if saving:
            _save(run, validation_loss, last)
        _tell_saves(run)


def _read(run: _Run, sums: StepSums) -> tuple[float, float]:
    """Loss and gradient norm of the step; waits for the device. Raises ``TrainingError`` once a gradient was not finite."""
    loss, grad_norm = torch.stack([run.engine.reduce_sum(sums.loss), sums.grad_norm]).tolist()
    bad_step = run.watch.first_bad()
    if bad_step is not None or not math.isfinite(loss):
        raise _not_finite(run, f"the loss or the gradient of step {bad_step or run.progress.step}")
    run.progress.train_loss = loss
    return loss, grad_norm


def _validate(run: _Run) -> float | None:
    """The loss on the held-out rows; None where there are none. Raises ``TrainingError`` where it is not finite."""
    found = validate(run.engine, run.validation)
    if found is None:
        return None
    if not math.isfinite(found.total):
        raise _not_finite(run, f"the validation loss after step {run.progress.step}")
    run.progress.validation_loss = found.total
    run.records.say("validation", run.progress, loss=found.total, detail={"streams": found.streams})
    return found.total


def _not_finite(run: _Run, what: str) -> TrainingError:
    """What every rank raises alike, once the save in flight is committed: the first to raise ends the others."""
    run.saves.wait()
    saved = newest(run.storage, run.job.run.folder)
    last = f"{saved.folder} (step {saved.step})" if saved else "none"
    return TrainingError(
        f"{what} is not finite; nothing was saved from there on",
        where=run.job.run.folder,
        hint=(
            f"last committed checkpoint: {last}; the same command would meet the same step: "
            "lower optimizer.learning_rate or optimizer.clip_norm and run again with --accept"
        ),
    )


def _save(run: _Run, validation_loss: float | None, last: bool) -> None:
    state = StepState(
        step=run.progress.step,
        loader_state=run.loader.state(run.progress.step),
        recipe=run.job.recipe,
        metrics=run.progress.metrics(validation_loss),
    )
    if last:
        run.saves.save_last(state)
    else:
        run.saves.save(state)


def _tell_saves(run: _Run) -> None:
    """A record for each save that ended; ``detail`` names its own step, which may lie behind."""
    for result in run.saves.results():
        detail = {
            "step": result.step,
            "folder": result.ref.folder if result.ref else "",
            "bytes": result.ref.bytes if result.ref else 0,
            "copy_s": result.copy_s,
            "write_s": result.write_s,
            "commit_s": result.commit_s,
        }
        run.records.say("checkpoint", run.progress, detail=detail | ({"error": result.error} if result.error else {}))


def _finished(storage: Storage, run_folder: str, steps: int, rank: int) -> Progress | None:
    """Where the run ended, if its newest checkpoint is of its last step or beyond, and whole; None where something is to do.

    A collective: ranks end together or go on together. One of them reads the checkpoint through.
    """
    saved = next(iter(survey(storage, run_folder).saved), None)
    over = saved if saved and saved.manifest.step >= steps else None
    views = set(gather_texts(over.ref.digest if over else ""))
    fault = _fault(storage, over.ref) if over and rank == 0 else ""
    if any(gather_texts(fault)) or over is None or len(views) > 1:
        return None
    return Progress(over.manifest.step, over.manifest.metrics)


def _fault(storage: Storage, ref: CheckpointRef) -> str:
    """What is wrong with a checkpoint, every byte of it read; empty where it is whole."""
    try:
        open_checkpoint(storage, ref).verify()
    except (IntegrityError, FileNotFoundError) as error:
        return str(error)
    return ""


def _open_loader(job: JobSpec, context: Context, layout: Layout, steps: range, lost: tuple[LostShard, ...]) -> Loader:
    from outgrow.streaming.loader import build_loader

    return build_loader(
        job,
        layout,
        context.rank,
        start_step=steps.start,
        stop_step=steps.stop,
        lost=lost,
        local_world=context.local_world,
        attempt=context.attempt,
    )


def _open_validation(
    job: JobSpec, context: Context, layout: Layout, lost: tuple[LostShard, ...]
) -> Iterable[tuple[str, StepRows]]:
    from outgrow.streaming.loader import build_validation

    return build_validation(job, layout, context.rank, lost=lost, attempt=context.attempt)


def _lost_shards(storage: Storage, run_folder: str, rank: int) -> tuple[LostShard, ...]:
    """The shards that the run goes on without, as one rank reads them: equal on all. A collective."""
    from outgrow.streaming.lost_shards import LostShard
    from outgrow.streaming.quarantine import read_lost

    read = [shard.to_dict() for shard in read_lost(storage, run_folder)] if rank == 0 else []
    return tuple(LostShard.from_dict(shard) for shard in json.loads(gather_texts(json.dumps(read))[0]))


def _named(lost: tuple[LostShard, ...]) -> dict[str, object]:
    """What the record of a start says of lost shards, where there are any."""
    return {"lost_shards": [shard.to_dict() for shard in lost]} if lost else {}


def _saves(recipe: Recipe, storage: Storage, group: Group, started: Started, device: torch.device) -> Saves:
    checkpointer = Checkpointer(
        storage,
        group,
        started.engine.tensors(),
        Retention(newest=recipe.checkpoint.keep_newest, best=recipe.checkpoint.keep_best),
        distrusted=[refused.folder for refused in started.refused],
    )
    return Saves(started.engine, checkpointer, recipe.checkpoint.every_steps, device)


def _versions_and_layout(layout: Layout, device: torch.device, started: Started) -> dict[str, object]:
    return {
        "world": layout.world,
        "layout": layout.to_dict(),
        "device": str(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "refused_checkpoints": {refused.folder: refused.reason for refused in started.refused},
    }
