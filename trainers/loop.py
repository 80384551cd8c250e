"""Training on one rank, from the job to the result: what every worker of a run does, top-down.

A step reads no number from the device. Losses are read where something is done with them: to be logged, before a
validation, and before a checkpoint, which is never made of weights that a non-finite gradient has touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import BestCheckpoint, Context, JobSpec, JsonDict, StepRows, WorkerResult
from outgrow.errors import ShardError, TrainingError
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.recording.recorder import Recorder
from outgrow.monitoring.trackers import open_trackers
from outgrow.recipes.layout import resolve, total_steps
from outgrow.recipes.measured import require_measured
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.training import RollBackOnRise
from outgrow.storage import Storage
from outgrow.trainers.attempt import Attempt, call_agent, facts_of, lookout, recorded, told_start
from outgrow.trainers.bring_up import Started, build_model, finished, prepare_process, start_engine, step_seed
from outgrow.trainers.ceilings import arithmetic_of, measured_flops
from outgrow.trainers.checkpoint.catalog import newest, survey
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.format import step_folder
from outgrow.trainers.checkpoint.resume import resume
from outgrow.trainers.checkpoint.retention import Retention, as_best, best_of
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.engines import Engine, StepSums
from outgrow.trainers.finite import FiniteWatch
from outgrow.trainers.guard import Action, guard_in, judge, taken_over, watched, why, why_ended
from outgrow.trainers.loading import Rows, lost_shards, open_loader, open_tokenizer, open_validation
from outgrow.trainers.profiling import ProfileWindow
from outgrow.trainers.progress import Progress
from outgrow.trainers.records import Records
from outgrow.trainers.roll_back import RollBack, go_back, settle, state_after
from outgrow.trainers.saves import Saves
from outgrow.trainers.schedule import learning_rate
from outgrow.trainers.stall_watch import StallWatch
from outgrow.trainers.telemetry import Figures, Telemetry
from outgrow.trainers.validation import ValidationLoss, validate

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # type: ignore[import-untyped]


@dataclass
class _Run:
    """All that a step needs, on one rank. ``progress`` and ``watch`` begin anew where the run goes back to a checkpoint."""

    job: JobSpec
    recipe: Recipe
    rank: int
    steps: int
    storage: Storage
    engine: Engine
    device: torch.device
    base: JsonDict | None
    distrusted: tuple[str, ...]
    loader: Rows
    validation: Iterable[tuple[str, StepRows]]
    general: frozenset[str]
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

    A run that has come to its last step already, or that its guard has ended, returns at once. Raises ``TrainingError`` for a
    gradient that is not finite and for a last checkpoint that cannot be written, ``RestartError`` where the run has given up a
    shard, ``PlanError`` where what the recipe measures itself by is not held out; what the parts raise (``UserError``,
    ``IntegrityError``) passes through.
    """
    recipe = Recipe.model_validate(job.recipe)
    site = Site.model_validate(job.site)
    storage = site.open_storage()
    require_measured(recipe, job.card)
    steps = total_steps(recipe, Mix.of(recipe, job.card))
    trackers = open_trackers(recipe.logging.trackers, job.recipe, storage, job.run.folder, node_folder(site))
    with closing(Records(context, storage, job.run.folder, steps, trackers)) as records:
        backs = settle(storage, job.run.folder, context.rank)
        end = finished(storage, job.run.folder, recipe, steps, context.rank)
        if end is not None:
            records.say("end", end, loss=end.validation_loss, detail=_last_words(end, storage, job, recipe, context.rank))
        else:
            with recorded(job, context, storage) as attempt:
                end = _go_on(attempt, recipe, storage, steps, backs, records)
        return end.result(step_folder(job.run.folder, end.step), _best(storage, job, recipe, context.rank))


def _go_on(
    attempt: Attempt, recipe: Recipe, storage: Storage, steps: int, backs: Sequence[RollBack], records: Records
) -> Progress:
    """The run at its end, after this start of it; ``backs`` are the times that it went back before."""
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
    saved, made_under = state_after(started.progress.guard, backs), guard_in(started.made_by)
    started.progress.guard = taken_over(saved, made_under, recipe.validation.on_rise)
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
            device=device,
            base=started.base.to_dict() if started.base else None,
            distrusted=tuple(refused.folder for refused in started.refused),
            loader=loader,
            validation=open_validation(job, context, layout, lost),
            general=frozenset(stream.name for stream in recipe.data.streams if stream.use == "validation"),
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
    """Every step that is left, each with what is due after it; those after a checkpoint again where the run goes back to it."""
    if run.progress.is_new and run.recipe.validation.before:
        _look_before(run)
    while _take_steps(run) == "roll_back":
        pass
    run.recorder.enter("productive")
    counts = run.loader.shard_counts()
    detail = {"shards": counts.to_dict()} if counts else {}
    detail["counters"] = run.recorder.counters()
    detail |= _last_words(run.progress, run.storage, run.job, run.recipe, run.rank)
    run.records.say("end", run.progress, loss=run.progress.validation_loss, detail=detail)


def _take_steps(run: _Run) -> Action:
    """The steps from where the run stands; what the guard has decided after the last of them."""
    engine, recipe, telemetry = run.engine, run.recipe, run.telemetry
    rate_factor = run.progress.guard.rate
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
        rate = learning_rate(recipe, rows.step, run.steps) * rate_factor
        engine.apply(rate)
        run.progress.advance(rows)
        run.watch.see(run.progress.step, sums.grad_norm)
        telemetry.finish_step(rows)
        run.profile.step(run.progress.step)
        action = _do_what_is_due(run, rows, sums, rate)
        if action != "go_on":
            return action
    return "go_on"


def _do_what_is_due(run: _Run, rows: StepRows, sums: StepSums, rate: float) -> Action:
    """Log, validate, save: in this order, each where its turn has come and all after the last step. What the guard has made of
    it: the run goes on, ends here, or has gone back."""
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
    measured: ValidationLoss | None = None
    action: Action = "go_on"
    if validating:
        with run.telemetry.between_steps("productive", "validation"):
            measured, action = _validate(run)
    if action == "roll_back" and not _go_back(run, measured):
        action = "stop"
    if action == "stop":
        _end_here(run, measured)
    if action == "stop" or (saving and action == "go_on"):
        with run.telemetry.between_steps("checkpoint", "checkpoint"):
            _save(run, measured, last or action == "stop")
    _tell_saves(run)
    return action


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


def _look_before(run: _Run) -> None:
    """The validation before the first step, and a checkpoint of it where the guard may go back as far as that."""
    with run.telemetry.before_steps("productive", "validation"):
        measured, _ = _validate(run)
    if isinstance(run.recipe.validation.on_rise, RollBackOnRise):
        with run.telemetry.before_steps("checkpoint", "checkpoint"):
            _save(run, measured, last=False)


def _validate(run: _Run) -> tuple[ValidationLoss | None, Action]:
    """The loss on the held-out rows, None where there are none, though prompts are continued then too; and what the guard
    makes of it.

    Raises ``TrainingError`` where it is not finite.
    """
    found = validate(run.engine, run.validation, run.general)
    loss = found.total if found else None
    if found and not all(map(math.isfinite, found.streams.values())):
        raise _not_finite(run, f"the validation loss after step {run.progress.step}")
    if loss is not None:
        run.progress.validation_loss = loss
        run.recorder.set(validation_loss=loss)
    samples = _continued(run)
    if found or samples:
        detail = {"streams": found.streams if found else {}, "samples": samples}
        run.records.say("validation", run.progress, loss=loss, detail=detail)
    guard = run.recipe.validation.on_rise
    run.progress.guard, action = judge(guard, run.progress.guard, run.progress.step, watched(guard, found))
    return found, action


def _go_back(run: _Run, measured: ValidationLoss | None) -> bool:
    """Whether the run stands at its best checkpoint now, as a start from there would; False where it has none. A collective."""
    from outgrow.streaming.loader import check_state

    guard, state, folder = run.recipe.validation.on_rise, run.progress.guard, run.job.run.folder
    loss = watched(guard, measured)
    assert isinstance(guard, RollBackOnRise) and loss is not None
    run.recorder.enter("restore")
    run.saves.give_up()
    _tell_saves(run)
    wanted = RollBack.wanted(state, run.progress.step, guard.factor, why(guard, state, run.progress.step, loss))
    back = go_back(run.storage, folder, run.rank, wanted, guard.metric, run.distrusted)
    if back is None:
        return False
    reader = resume(run.storage, folder, run.engine.load).reader
    assert reader is not None, "the checkpoint was there just now"
    run.progress = Progress(check_state(reader.loader_state, run.job), reader.manifest.metrics)
    run.progress.guard, run.watch = back.state, FiniteWatch(run.device)
    run.loader.go_back(run.progress.step)
    run.records.say("roll_back", run.progress, detail=back.to_dict())
    return True


def _end_here(run: _Run, measured: ValidationLoss | None) -> None:
    """Note that the guard ends the run, and why, in the words of a later start that finds the checkpoint."""
    progress = run.progress
    progress.guard = dataclasses.replace(progress.guard, ended=True)
    progress.ended = why_ended(progress.metrics(measured), progress.step, run.job.recipe, run.recipe.validation.on_rise)


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


def _save(run: _Run, measured: ValidationLoss | None, last: bool) -> None:
    if measured and isinstance(run.recipe.validation.on_rise, RollBackOnRise):
        run.saves.wait()  # not put off: which checkpoints there are to go back to must not depend on how fast a disk was
    state = StepState(
        step=run.progress.step,
        loader_state=run.loader.state(run.progress.step),
        recipe=run.job.recipe,
        metrics=run.progress.metrics(measured),
        base=run.base,
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
        Retention(newest=recipe.checkpoint.keep_newest, best=recipe.checkpoint.keep_best, metric=recipe.checkpoint.best_by),
        distrusted=[refused.folder for refused in started.refused],
    )
    return Saves(started.engine, checkpointer, recipe.checkpoint.every_steps, device)


def _last_words(end: Progress, storage: Storage, job: JobSpec, recipe: Recipe, rank: int) -> JsonDict:
    """What the event of the end says of it."""
    best = _best(storage, job, recipe, rank)
    return {"ended": end.ended, "best": best.to_dict() if best else None}


def _best(storage: Storage, job: JobSpec, recipe: Recipe, rank: int) -> BestCheckpoint | None:
    """The best checkpoint of the run by the recipe's metric, as rank 0 finds it; None where none was measured."""
    best = best_of(survey(storage, job.run.folder).saved, recipe.checkpoint.best_by) if rank == 0 else None
    return as_best(best, recipe.checkpoint.best_by) if best else None
