"""Training on one rank, from the job to the result: what every worker of a run does, top-down.

A step reads no number from the device. Losses are read where something is done with them: to be logged, before a
validation, and before a checkpoint, which is never made of weights that a non-finite gradient has touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import Context, JobSpec, Loader, StepRows, WorkerResult
from outgrow.errors import ShardError, TrainingError
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.recording.recorder import Recorder
from outgrow.monitoring.trackers import open_trackers
from outgrow.recipes.layout import resolve, total_steps
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.attempt import Attempt, call_agent, facts_of, lookout, recorded, told_start
from outgrow.trainers.bring_up import Started, build_model, finished, prepare_process, start_engine, step_seed
from outgrow.trainers.ceilings import arithmetic_of, measured_flops
from outgrow.trainers.checkpoint.catalog import newest
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.format import step_folder
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.engines import Engine, StepSums
from outgrow.trainers.finite import FiniteWatch
from outgrow.trainers.loading import lost_shards, open_loader, open_tokenizer, open_validation
from outgrow.trainers.profiling import ProfileWindow
from outgrow.trainers.progress import Progress
from outgrow.trainers.records import Records
from outgrow.trainers.saves import Saves
from outgrow.trainers.schedule import learning_rate
from outgrow.trainers.stall_watch import StallWatch
from outgrow.trainers.telemetry import Figures, Telemetry
from outgrow.trainers.validation import validate

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # type: ignore[import-untyped]


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
    tokenizer: Tokenizer | None
    positions: int
    saves: Saves
    records: Records
    progress: Progress
    watch: FiniteWatch
    recorder: Recorder
    profile: ProfileWindow
    telemetry: Telemetry


def train_worker(job: JobSpec, context: Context) -> WorkerResult:
    """The end of the run on this rank, after training it from its newest checkpoint, or from the start, to its last step.

    A run that has come to its last step already returns at once. Raises ``TrainingError`` for a gradient that is not
    finite and for a last checkpoint that cannot be written, ``RestartError`` where the run has given up a shard; what the
    parts raise (``UserError``, ``IntegrityError``) passes through.
    """
    recipe = Recipe.model_validate(job.recipe)
    site = Site.model_validate(job.site)
    storage = site.open_storage()
    steps = total_steps(recipe, Mix.of(recipe, job.card))
    trackers = open_trackers(recipe.logging.trackers, job.recipe, storage, job.run.folder, node_folder(site))
    with closing(Records(context, storage, job.run.folder, steps, trackers)) as records:
        if end := finished(storage, job.run.folder, steps, context.rank):
            records.say("end", end, loss=end.validation_loss)
            return end.result(step_folder(job.run.folder, end.step))
        with recorded(job, context, storage) as attempt:
            progress = _go_on(attempt, recipe, storage, steps, records)
        return progress.result(step_folder(job.run.folder, steps))


def _go_on(attempt: Attempt, recipe: Recipe, storage: Storage, steps: int, records: Records) -> Progress:
    """The run at its end, after this start of it."""
    from outgrow.streaming.quarantine import answer

    job, context, recorder = attempt.job, attempt.context, attempt.recorder
    device = prepare_process(job, recipe, context.local_rank)
    ceiling = measured_flops(device, recipe.precision)
    recorder.set(measured_flops=ceiling)
    layout = resolve(recipe, context.world, context.local_world)
    model = build_model(job, recipe)
    arithmetic = arithmetic_of(model)
    facts = facts_of(attempt, layout, device, arithmetic, steps)
    attempt.write(facts)
    agent = call_agent(attempt)
    started = start_engine(job, recipe, layout, storage, device, model, recorder)
    lost = lost_shards(storage, job.run.folder, context.rank)
    detail = told_start(attempt, facts, layout, device, started, lost) | {"agent": agent, "measured_flops": ceiling}
    records.say("start", started.progress, detail=detail)
    group = Group(job.run.folder, context.attempt, context.rank, context.world)
    with (
        closing(_saves(recipe, storage, group, started, device)) as saves,
        closing(open_loader(job, context, layout, range(started.progress.step, steps), lost)) as loader,
        lookout(attempt),
        closing(StallWatch(attempt.stalls, context.rank, recorder.threshold_s, recorder.open_s)),
        closing(ProfileWindow(recipe.profile, context.rank, storage, job.run.folder, device, started.progress.step)) as profile,
    ):
        attempt.write(dataclasses.replace(facts, shard_counts=loader.shard_counts_file()))
        run = _Run(
            job=job,
            recipe=recipe,
            rank=context.rank,
            steps=steps,
            storage=storage,
            engine=started.engine,
            loader=loader,
            validation=open_validation(job, context, layout, lost),
            tokenizer=open_tokenizer(job) if recipe.validation.prompts else None,
            positions=model.config.max_position_embeddings,
            saves=saves,
            records=records,
            progress=started.progress,
            watch=FiniteWatch(device),
            recorder=recorder,
            profile=profile,
            telemetry=Telemetry(recorder, loader, device, arithmetic.flops_per_token),
        )
        try:
            _train(run)
        except ShardError as error:
            raise answer(error, job, lost) from error
        finally:
            saves.close()  # one in flight may still come to its end, and is told then, however the run ended
            _tell_saves(run)
    return run.progress


def _train(run: _Run) -> None:
    """Every step that is left, each with what is due after it."""
    engine, recipe, telemetry = run.engine, run.recipe, run.telemetry
    for rows in telemetry.steps():
        torch.manual_seed(step_seed(recipe.run.seed, rows.step, run.rank))
        # A step of prompts alone learns nothing: its loss is 0 then, not 0 / 0.
        global_weight = rows.global_weight or 1.0
        for batch in rows.micro_batches:
            telemetry.mark("forward")
            engine.accumulate(batch, global_weight, telemetry.mark)
        telemetry.mark("collectives")
        sums = engine.finish()
        telemetry.mark("optimizer")
        rate = learning_rate(recipe, rows.step, run.steps)
        engine.apply(rate)
        run.progress.advance(rows)
        run.watch.see(run.progress.step, sums.grad_norm)
        telemetry.finish_step(rows)
        run.profile.step(run.progress.step)
        _do_what_is_due(run, rows, sums, rate)
    counts = run.loader.shard_counts()
    detail = {"shards": counts.to_dict()} if counts else {}
    detail["counters"] = run.recorder.counters()
    run.records.say("end", run.progress, loss=run.progress.validation_loss, detail=detail)


def _do_what_is_due(run: _Run, rows: StepRows, sums: StepSums, rate: float) -> None:
    """Log, validate, save: in this order, each where its turn has come and all after the last step."""
    step, last = run.progress.step, run.progress.step == run.steps
    logging = last or step % run.recipe.logging.every_steps == 0
    every_steps = run.recipe.validation.every_steps
    validating = last or (every_steps > 0 and step % every_steps == 0)
    saving = last or run.saves.due(step)
    if logging or validating or saving:
        figures = _read(run, rows, sums)
        if logging:
            fields = run.telemetry.look(figures, rate, run.records.dropped)
            run.records.say("step", run.progress, loss=figures.loss, grad_norm=figures.grad_norm, learning_rate=rate, **fields)
    validation_loss = None
    if validating:
        with run.telemetry.between_steps("productive", "validation"):
            validation_loss = _validate(run)
    if saving:
        with run.telemetry.between_steps("checkpoint", "checkpoint"):
            _save(run, validation_loss, last)
    _tell_saves(run)


def _read(run: _Run, rows: StepRows, sums: StepSums) -> Figures:
    """Losses and gradient norm of the step; waits for the device. Raises ``TrainingError`` once a gradient was not finite."""
    read = torch.stack([run.engine.reduce_sum(sums.loss), sums.grad_norm, sums.loss]).tolist()
    loss, grad_norm, share = read
    bad_step = run.watch.first_bad()
    if bad_step is not None or not math.isfinite(loss):
        raise _not_finite(run, f"the loss or the gradient of step {bad_step or run.progress.step}")
    run.progress.train_loss = loss
    own_weight = math.fsum(float(batch.weights.sum()) for batch in rows.micro_batches)
    rank_loss = share * (rows.global_weight or 1.0) / own_weight if own_weight else math.nan
    return Figures(loss=loss, rank_loss=rank_loss, grad_norm=grad_norm)


def _validate(run: _Run) -> float | None:
    """The loss on the held-out rows; None where there are none, though prompts are continued then too.

    Raises ``TrainingError`` where it is not finite.
    """
    found = validate(run.engine, run.validation)
    loss = found.total if found else None
    if loss is not None:
        if not math.isfinite(loss):
            raise _not_finite(run, f"the validation loss after step {run.progress.step}")
        run.progress.validation_loss = loss
        run.recorder.set(validation_loss=loss)
    samples = _continued(run)
    if found or samples:
        detail = {"streams": found.streams if found else {}, "samples": samples}
        run.records.say("validation", run.progress, loss=loss, detail=detail)
    return loss


def _continued(run: _Run) -> list[dict[str, str]]:
    """The recipe's prompts as the model continues them now. All ranks call it."""
    wanted = run.recipe.validation
    if run.tokenizer is None:
        return []
    from outgrow.trainers.samples import continue_prompts

    end = run.job.card.eos_token_id
    return continue_prompts(run.engine, run.tokenizer, wanted.prompts, wanted.prompt_tokens, run.positions, end)


def _not_finite(run: _Run, what: str) -> TrainingError:
    """What every rank raises alike, once the save in flight is committed: the first to raise ends the others."""
    run.recorder.add(nonfinite=1)
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
        run.telemetry.saved(result)
        run.records.say("checkpoint", run.progress, detail=detail | ({"error": result.error} if result.error else {}))


def _saves(recipe: Recipe, storage: Storage, group: Group, started: Started, device: torch.device) -> Saves:
    checkpointer = Checkpointer(
        storage,
        group,
        started.engine.tensors(),
        Retention(newest=recipe.checkpoint.keep_newest, best=recipe.checkpoint.keep_best),
        distrusted=[refused.folder for refused in started.refused],
    )
    return Saves(started.engine, checkpointer, recipe.checkpoint.every_steps, device)
