"""The plan of a run: who computes what, how long, how much it keeps on disk, and every reason why it could not start.

Pure arithmetic on a recipe, a site and what was found; a plan is refused here, before a device is touched. The layout it shows
is worked out again at every start of the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from outgrow.cluster.fit import Machine, memory_refusals, node_bytes, terms
from outgrow.cluster.ray_environment import worker_environment
from outgrow.cluster.sizes import size as size
from outgrow.contracts import DataReading, DatasetCard, Forecast, Inventory, JsonDict, Layout, ModelFacts, Plan, Refusal
from outgrow.errors import PlanError
from outgrow.processes import GPU_ENVIRONMENT
from outgrow.recipes import combinations
from outgrow.recipes import layout as layouts
from outgrow.recipes.deepspeed import deepspeed_config, extensions_folder, folders, offloads_to_nvme
from outgrow.recipes.measured import require_measured
from outgrow.recipes.memory import count, forecast, state_bytes
from outgrow.recipes.mix import Mix, stage_lengths
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Zero
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.sources import PreferenceShape

_BESIDE_BYTES = 2**20
"""Names, digests, the recipe and the data position of a checkpoint; well above what was seen."""
_USEFUL_PASSES = 4
"""Up to about so many, repeated text is nearly as good as new; Muennighoff et al. 2023, Scaling Data-Constrained LMs."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What the site's ``auto`` comes to: ``workers`` ranks on ``device`` with ``threads`` CPU threads each."""

    device: str
    workers: int
    threads: int


def resolve_ranks(site: Site, inventory: Inventory) -> Ranks:
    """One rank a GPU, or one on a machine without; the machine's cores shared among them; what the site fixes stays."""
    device = site.device if site.device != "auto" else "cuda" if inventory.gpus else "cpu"
    on_gpus = len(inventory.gpus) if device == "cuda" else 0
    workers = site.workers if site.workers != "auto" else max(1, on_gpus)
    threads = site.threads_per_worker if site.threads_per_worker != "auto" else max(1, inventory.cores // workers)
    return Ranks(device=device, workers=workers, threads=threads)


def make_plan(
    recipe: Recipe,
    site: Site,
    inventory: Inventory,
    card: DatasetCard | None,
    facts: ModelFacts,
    *,
    free_bytes: int | None,
    environment: Mapping[str, str],
    tier_bytes: int | None = None,
    one_disk: bool = False,
    cluster: str | None = None,
    reading: DataReading | None = None,
    met: Sequence[Refusal] = (),
) -> Plan:
    """The plan of ``recipe`` on this machine; it cannot start where ``refusals`` is not empty, and all of them are there.

    ``card`` is None before the data are built. ``free_bytes`` is what the run's storage has for it, its own older
    checkpoints included; None for a bucket. ``tier_bytes`` is the room on the site's first tier, None where nobody knows;
    ``one_disk``: both are the same room.
    ``environment`` is what outgrow sets for the driver. ``cluster`` is the address of a Ray cluster of other machines than
    this one: its room is asked for when the run starts there, not here. ``reading`` is how this machine will read the
    dataset, None where it will not, or where that is not known yet. ``met`` is what else a run would meet on this machine.
    """
    ranks = resolve_ranks(site, inventory)
    without_room = [] if cluster else _room_for_ranks(ranks, inventory)
    refusals = without_room + combinations.refusals(
        recipe, ranks.device, shares_experts=ranks.workers > 1 and facts.has_mixtures
    )
    layout, mix, foreseen = None, None, None
    machine = Machine.of(inventory, ranks.device, ranks.workers, tier_bytes, has_tier=bool(site.tiers))
    try:
        layout = layouts.resolve(recipe, ranks.workers, machine.local_workers)
        foreseen = forecast(recipe, facts, layout, machine.local_workers, ranks.device)
    except PlanError as error:
        refusals.append(_refusal(error))
    # A cluster of other machines has been asked what they have when it is more than one.
    if layout and not without_room and (cluster is None or inventory.nodes > 1):
        refusals += memory_refusals(recipe, facts, machine)
    refusals += _no_tier(recipe, site)
    try:
        mix = Mix.of(recipe, card) if card else None
        if card:
            require_measured(recipe, card)
    except PlanError as error:
        refusals.append(_refusal(error))
    steps = _steps(recipe, mix)
    checkpoint = state_bytes(recipe, facts) + _BESIDE_BYTES
    # One more than is kept: the oldest goes only when the new one is committed.
    run_bytes = (recipe.checkpoint.keep_newest + recipe.checkpoint.keep_best + 1) * checkpoint
    beside = sum(foreseen.disk.values()) if foreseen and one_disk else 0
    refusals += _room_on_disk(recipe, site, run_bytes, checkpoint, beside, free_bytes) + _not_learnable(recipe, card)
    refusals += _not_profilable(recipe, ranks, steps)
    refusals += [*([reading.refusal] if reading and reading.refusal else []), *met]
    return Plan(
        run=recipe.run.name,
        workers=ranks.workers,
        device=ranks.device,
        threads_per_worker=ranks.threads,
        layout=layout,
        steps=steps,
        steps_per_epoch=mix.steps_per_epoch if mix else 0,
        tokens=_tokens(recipe, card, mix, steps),
        checkpoint_bytes=checkpoint,
        run_bytes=run_bytes,
        storage=site.storage,
        storage_free_bytes=free_bytes,
        environment={**environment, **worker_environment(ranks.threads), **_engine_environment(site, ranks.device, layout)},
        refusals=tuple(refusals),
        notes=(
            *_notes(recipe, card, facts, ranks, cluster),
            *_state_notes(recipe, facts),
            *([reading.note] if reading and reading.note else []),
            *_mix_notes(recipe, card, mix, steps),
        ),
        forecast=foreseen,
        engine_settings=_engine_settings(recipe, facts, site, layout),
    )


def refuse(plan: Plan) -> None:
    """Nothing where ``plan`` can start. Raises ``PlanError`` with every refusal where it cannot."""
    if plan.refusals:
        raise PlanError("\n".join(["this run cannot start", *(f"  - {_sentence(r)}" for r in plan.refusals)]))


# --- what can be refused ----------------------------------------------------------------------------------------------


def _room_for_ranks(ranks: Ranks, inventory: Inventory) -> list[Refusal]:
    refusals = []
    cores, gpus = inventory.cores, len(inventory.gpus)
    if ranks.device == "cuda" and ranks.workers > gpus:
        nearest = f"workers: {gpus} in site.yaml" if gpus else "device: cpu in site.yaml"
        refusals.append(Refusal(asked=f"{ranks.workers} rank(s) on cuda", available=f"{gpus} GPUs", nearest=nearest))
    if ranks.workers * ranks.threads > cores:
        threads = cores // ranks.workers
        nearest = f"threads_per_worker: {threads} in site.yaml" if threads else f"workers: {cores} in site.yaml"
        asked = f"{ranks.workers} rank(s) of {ranks.threads} CPU(s)"
        refusals.append(Refusal(asked=asked, available=f"{cores} CPUs", nearest=nearest))
    return refusals


def _room_on_disk(recipe: Recipe, site: Site, run: int, checkpoint: int, beside: int, free: int | None) -> list[Refusal]:
    """``beside`` are bytes that the run puts on the same disk for a tier."""
    if free is None or run + beside <= free:
        return []
    keep = recipe.checkpoint.keep_newest + recipe.checkpoint.keep_best
    fitting = (free - beside) // checkpoint - 1
    tier = f", beside {size(beside)} on the first tier, which is the same disk" if beside else ""
    fewer = f"; or keep {fitting} of them (checkpoint.keep_newest, keep_best)" if 0 < fitting < keep else ""
    return [
        Refusal(
            asked=f"{size(run)} for {keep} checkpoints and one being written, {size(checkpoint)} each{tier}",
            available=f"{size(free)} at {site.storage}",
            nearest=f"free {size(run + beside - free)}, or name another storage in site.yaml{fewer}",
        )
    ]


def _not_learnable(recipe: Recipe, card: DatasetCard | None) -> list[Refusal]:
    """Preference pairs, of which the objective ``next_token`` would learn the rejected answers just as well."""
    paired = {
        stream.name for stream in recipe.data.streams if isinstance(getattr(stream.source, "shape", None), PreferenceShape)
    }
    paired |= {stream.name for stream in card.streams if stream.pairs} if card else set()
    if not paired:
        return []
    return [
        Refusal(
            asked=f"objective.kind {recipe.objective.kind} on the preference pairs of {', '.join(sorted(paired))}",
            available="it would learn the rejected answers too",
            nearest="take these streams out, or read their chosen answers alone with source.shape messages or alpaca",
        )
    ]


def _not_profilable(recipe: Recipe, ranks: Ranks, steps: int) -> list[Refusal]:
    """A window of steps or ranks that the run does not have, and a history of allocations where no device keeps one."""
    profile = recipe.profile
    if not profile.steps:
        return []
    refusals = []
    if steps and profile.start_step > steps:
        asked, nearest = f"profile.start_step {profile.start_step}", f"profile.start_step={max(1, steps - profile.steps + 1)}"
        refusals.append(Refusal(asked=asked, available=f"{steps} steps", nearest=nearest))
    if missing := sorted(rank for rank in profile.ranks if rank >= ranks.workers):
        asked, nearest = f"profile.ranks {', '.join(map(str, missing))}", f"profile.ranks=[{ranks.workers - 1}]"
        refusals.append(Refusal(asked=asked, available=f"ranks 0 to {ranks.workers - 1}", nearest=nearest))
    if profile.memory and ranks.device != "cuda":
        refusals.append(
            Refusal(
                asked="profile.memory: a history of the device's allocations",
                available=f"{ranks.device} keeps none, cuda alone does",
                nearest="profile.memory=false: the trace of the steps alone",
            )
        )
    return refusals


def _no_tier(recipe: Recipe, site: Site) -> list[Refusal]:
    """Offload to a disk where the site has not said which disk outgrow may use so."""
    zero = recipe.parallel
    if not isinstance(zero, Zero) or not offloads_to_nvme(zero) or site.tiers:
        return []
    nearest = "tiers: [{name: nvme, path: FOLDER}] in site.yaml, a folder on the fastest disk"
    return [Refusal(asked="parallel: offload to nvme", available="no tier is declared", nearest=nearest)]


def _refusal(error: PlanError) -> Refusal:
    return Refusal(asked=error.message, available="", nearest=error.hint)


# --- the forecast -----------------------------------------------------------------------------------------------------


def _steps(recipe: Recipe, mix: Mix | None) -> int:
    """Optimizer steps of the run; 0 where they follow from a dataset that is not built yet, or has no mix."""
    return 0 if mix is None and recipe.duration.epochs is not None else layouts.total_steps(recipe, mix)


def _tokens(recipe: Recipe, card: DatasetCard | None, mix: Mix | None, steps: int) -> int:
    """Tokens that ``steps`` steps see, rows being as full as their stream's are on average; before the build, as if full."""
    if card is None or mix is None:
        return layouts.positions(recipe, steps)
    return round(
        sum(
            Fraction(rows * stream.tokens, stream.rows)
            for phase, drawn in mix.drawn(steps)
            for rows, stream in zip(drawn, card.indexes[phase.index].streams, strict=True)
            if rows
        )
    )


def _notes(recipe: Recipe, card: DatasetCard | None, facts: ModelFacts, ranks: Ranks, cluster: str | None) -> tuple[str, ...]:
    notes = [f"{facts.family}: {facts.parameters:,} parameters in {facts.blocks} blocks"]
    if card is None:
        notes.append("the dataset is not built yet; outgrow data build, or the run itself, builds it")
    if cluster:
        notes.append(f"whether the ranks fit is asked of the cluster at {cluster} when the run starts")
    if ranks.device == "cpu" and recipe.precision == "bf16":
        notes.append("bf16 is slow on most CPUs; precision=fp32 is up to ten times as fast there")
    return tuple(notes)


def _state_notes(recipe: Recipe, facts: ModelFacts) -> Iterator[str]:
    """How much of the model is trained, and what that keeps whatever it is spread over."""
    if not facts.shapes:
        return
    trained = count(recipe, facts).whole.trained
    states = state_bytes(recipe, facts)
    yield (
        f"{trained:,} numbers are trained ({trained / facts.parameters:.2%}); with {recipe.optimizer.kind} they keep "
        f"{size(states)} of parameters and states, {states / trained:.1f} bytes each, over all ranks together"
    )


def _engine_environment(site: Site, device: str, layout: Layout | None) -> dict[str, str]:
    variables = dict(GPU_ENVIRONMENT) if device == "cuda" else {}
    if layout is not None and layout.engine == "zero":
        variables["TORCH_EXTENSIONS_DIR"] = str(extensions_folder(Path(site.cache).expanduser()))
    return variables


def _engine_settings(recipe: Recipe, facts: ModelFacts, site: Site, layout: Layout | None) -> JsonDict:
    if layout is None or layout.engine != "zero":
        return {}
    offload = folders(recipe, site).offload if site.tiers else None
    return deepspeed_config(layout, recipe, str(offload or ""), facts.largest_tensor)


def _mix_notes(recipe: Recipe, card: DatasetCard | None, mix: Mix | None, steps: int) -> list[str]:
    """What becomes of the streams over the whole run: the stages, how often each stream is read, and what that is too much."""
    notes = [_stage_note(recipe, number, first) for number, first in enumerate(_first_steps(recipe))]
    notes += [
        f"the run ends before stage {number} begins; raise duration, or shorten the stages before"
        for number, first in enumerate(_first_steps(recipe), start=1)
        if 0 < steps <= first
    ][:1]
    if card is None or mix is None:
        return notes
    passes = _passes(card, mix, steps)
    notes.append("passes over each stream: " + ", ".join(f"{name} {float(count):.1f}" for name, count in passes.items()))
    often = [name for name, count in passes.items() if count > _USEFUL_PASSES]
    if often:
        notes.append(
            f"{', '.join(often)}: read more than {_USEFUL_PASSES} times; beyond that repeated text tends to teach little "
            "(Muennighoff et al. 2023)"
        )
    return notes


def _passes(card: DatasetCard, mix: Mix, steps: int) -> dict[str, Fraction]:
    """How often the run reads each stream."""
    passes = dict.fromkeys(mix.streams, Fraction(0))
    for phase, drawn in mix.drawn(steps):
        for rows, stream in zip(drawn, card.indexes[phase.index].streams, strict=True):
            passes[stream.name] += Fraction(rows, stream.rows) if rows else 0
    return passes


def _first_steps(recipe: Recipe) -> list[int]:
    """The first step of each stage; none without stages."""
    lengths = [steps or 0 for steps, _ in stage_lengths(recipe)] if recipe.data.stages else []
    return [sum(lengths[:number]) for number in range(len(lengths))]


def _stage_note(recipe: Recipe, number: int, first_step: int) -> str:
    stage, (steps, length) = recipe.data.stages[number], stage_lengths(recipe)[number]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in stage.shares.items() if share)
    lasts = f"{steps:,} steps" if steps else "to the end"
    return f"stage {number + 1} from step {first_step + 1:,}, {lasts}, rows of {length:,}: {shares}"


# --- for people -------------------------------------------------------------------------------------------------------


def render(plan: Plan, *, elsewhere: bool = False) -> str:
    """The plan as lines of plain text, the refusals last; ``elsewhere``: for machines that are not here."""
    rows = [
        ("run", plan.run),
        ("ranks", f"{plan.workers} on {plan.device}, {plan.threads_per_worker} thread(s) each"),
        *([("layout", _layout(plan.layout))] if plan.layout else []),
        *_memory_rows(plan),
        ("length", _length(plan)),
        ("disk", _disk(plan)),
        *([("sets", f"DeepSpeed {json.dumps(plan.engine_settings)}")] if plan.engine_settings else []),
        *(("sets", f"{name}={value}") for name, value in sorted(plan.environment.items())),
        *(("note", note) for note in plan.notes),
    ]
    lines = [f"{label:<8}{text}" for label, text in rows]
    if not plan.refusals:
        return "\n".join([*lines, "", "this run could start there" if elsewhere else "this run can start"])
    return "\n".join([*lines, "", "this run cannot start", *(f"  - {_sentence(refusal)}" for refusal in plan.refusals)])


def _layout(layout: Layout) -> str:
    mesh = "" if layout.world == 1 else f", {layout.replicate} replica(s) of {layout.shard} shard(s)"
    return (
        f"engine {layout.engine}{mesh}; {layout.global_rows} rows a step, "
        f"{layout.accumulation} x {layout.micro_rows} of them a rank at most"
    )


def _memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What each rank's device, a node's memory and its first tier hold at most."""
    foreseen = plan.forecast
    if foreseen is None or plan.layout is None:
        return
    yield "memory", f"{size(sum(foreseen.device.values()))} on the device of a rank: {terms(foreseen.device)}"
    if plan.device == "cuda":
        in_memory = node_bytes(foreseen, plan.device, plan.workers)
        yield "", f"{size(in_memory)} in a node's memory: {terms(foreseen.host)}"
    else:
        yield "", f"{size(sum(foreseen.host.values()))} beside them in memory: {terms(foreseen.host)}"
    if foreseen.disk:
        traffic = _traffic(foreseen)
        where = "a node's first tier (its cache folder where the site has no tiers)"
        yield "", f"{size(sum(foreseen.disk.values()))} on {where}: {terms(foreseen.disk)}{traffic}"


def _traffic(foreseen: Forecast) -> str:
    if not foreseen.step_read_bytes:
        return ""
    return f"; a step reads {size(foreseen.step_read_bytes)} and writes {size(foreseen.step_written_bytes)}"


def _length(plan: Plan) -> str:
    if not plan.steps:
        return "known when the dataset is built"
    epochs = f", {plan.steps / plan.steps_per_epoch:.2f} epochs" if plan.steps_per_epoch else ""
    return f"{plan.steps:,} steps, {plan.tokens:,} tokens{epochs}"


def _disk(plan: Plan) -> str:
    free = "" if plan.storage_free_bytes is None else f" ({size(plan.storage_free_bytes)} free)"
    return f"{size(plan.checkpoint_bytes)} a checkpoint, {size(plan.run_bytes)} the run, at {plan.storage}{free}"


def _sentence(refusal: Refusal) -> str:
    there = f"; available: {refusal.available}" if refusal.available else ""
    asked = refusal.asked.replace("\n", "\n      ")
    return f"{asked}{there}" + (f"\n    {refusal.nearest}" if refusal.nearest else "")
