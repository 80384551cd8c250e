"""What happens on a rank before its first step: the process is set up, and a model gets memory and weights or a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import CheckpointRef, JobSpec, JsonDict, Layout
from outgrow.errors import IntegrityError
from outgrow.monitoring.recording.recorder import Recorder
from outgrow.processes import GPU_ENVIRONMENT
from outgrow.recipes import deepspeed
from outgrow.recipes.placed import weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora, NoAdapter
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.adapters.identity import BaseIdentity, base_of, require_same_base
from outgrow.trainers.adapters.lora import adapt
from outgrow.trainers.adapters.sources import AdaptedWeights
from outgrow.trainers.checkpoint.catalog import Refused, Saved, survey
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.checkpoint.resume import gather_texts, resume
from outgrow.trainers.engines import Engine, make_engine
from outgrow.trainers.guard import GuardState, why_ended
from outgrow.trainers.models.build import config_for, meta_model
from outgrow.trainers.models.custom import is_custom
from outgrow.trainers.models.custom_probe import check_custom
from outgrow.trainers.models.grown import GrownWeights
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.models.weights import FolderWeights
from outgrow.trainers.progress import Progress
from outgrow.trainers.regions import TensorSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Started:
    """A filled engine, how far its weights have come, and the checkpoints that were passed over as not whole.

    ``base`` is the identity of the folder that an adapter stands beside; None where there is none. ``made_by`` is the recipe of
    the checkpoint, empty where there was none.
    """

    engine: Engine
    progress: Progress
    refused: tuple[Refused, ...]
    base: BaseIdentity | None = None
    made_by: JsonDict = field(default_factory=dict)


def finished(storage: Storage, run_folder: str, recipe: Recipe, steps: int, rank: int) -> Progress | None:
    """Where the run ended, if its newest checkpoint is whole, and of its last step or beyond, or of a step where its guard
    ended it; None where something is to do.

    A collective: ranks end together or go on together. One of them reads the checkpoint through.
    """
    saved = next(iter(survey(storage, run_folder).saved), None)
    ended = _why_ended(storage, saved, recipe) if saved else ""
    over = saved if saved and (saved.manifest.step >= steps or ended) else None
    views = set(gather_texts(over.ref.digest if over else ""))
    fault = _fault(storage, over.ref) if over and rank == 0 else ""
    if any(gather_texts(fault)) or over is None or len(views) > 1:
        return None
    progress = Progress(over.manifest.step, over.manifest.metrics)
    progress.ended = ended
    return progress


def _why_ended(storage: Storage, saved: Saved, recipe: Recipe) -> str:
    """Why the guard of ``recipe`` ended the run with this checkpoint; empty where it did not, or the checkpoint is damaged."""
    if not GuardState.of(saved.manifest.metrics).ended:
        return ""
    try:
        made_by = open_checkpoint(storage, saved.ref).recipe
    except (IntegrityError, FileNotFoundError):
        return ""
    return why_ended(saved.manifest.metrics, saved.manifest.step, made_by, recipe.validation.on_rise)


def _fault(storage: Storage, ref: CheckpointRef) -> str:
    """What is wrong with a checkpoint, every byte of it read; empty where it is whole."""
    try:
        open_checkpoint(storage, ref).verify()
    except (IntegrityError, FileNotFoundError) as error:
        return str(error)
    return ""


def prepare_process(job: JobSpec, recipe: Recipe, local_rank: int) -> torch.device:
    """The device of this rank, after threads, deterministic kernels and the current device are set for the whole process."""
    torch.set_num_threads(job.threads_per_worker)
    torch.use_deterministic_algorithms(recipe.deterministic)
    # Every value is written before it is read; filling fresh memory with NaN first costs a pass over each buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if job.device != "cuda":
        return torch.device(job.device)
    for name, value in GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def build_model(job: JobSpec, recipe: Recipe) -> PreTrainedModel:
    """The recipe's model with its adapter, its parameters on meta; ``requires_grad`` says what is trained.

    Raises ``ModelError`` for a configuration or a folder that does not fit, and for an adapter that finds no layer.
    """
    model = meta_model(config_for(recipe, Site.model_validate(job.site), job.card), recipe.precision)
    adapt(model, recipe)
    return model


def start_engine(
    job: JobSpec,
    recipe: Recipe,
    layout: Layout,
    storage: Storage,
    device: torch.device,
    model: PreTrainedModel,
    recorder: Recorder,
) -> Started:
    """The newest whole checkpoint in an engine of ``layout``, or the first weights where there is none. All ranks call it.

    ``model`` is what ``build_model`` gave; ``recorder`` is told how long the checkpoint took. Raises ``ModelError`` for a
    folder that does not fit and for a checkpoint that belongs to another base, ``IntegrityError`` where no checkpoint is whole,
    ``RunError`` where the checkpoint was trained on other rows.
    """
    from outgrow.streaming.loader import check_state

    site = Site.model_validate(job.site)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    engine = make_engine(layout, recipe, model, device, deepspeed.folders(recipe, site))
    if is_custom(model.config):
        check_custom(engine, shapes, model.config.vocab_size, model.config.max_position_embeddings)
    recorder.enter("restore")
    resumed = resume(storage, job.run.folder, engine.load)
    recorder.enter("init")
    if resumed.reader is None:
        _give_weights(engine.load_model, job, recipe, model, device)
        return Started(engine, Progress(), resumed.refused, base_of(recipe, site))
    step = check_state(resumed.reader.loader_state, job)
    base = base_of(recipe, site)
    require_same_base(resumed.reader.base, base, resumed.reader.ref.folder)
    if not isinstance(recipe.adapter, NoAdapter):  # what is frozen is in no checkpoint
        _give_weights(engine.load_frozen, job, recipe, model, device)
    progress = Progress(step, resumed.reader.manifest.metrics)
    return Started(engine, progress, resumed.refused, base, resumed.reader.recipe)


def _give_weights(
    load: Callable[[TensorSource], None], job: JobSpec, recipe: Recipe, model: PreTrainedModel, device: torch.device
) -> None:
    """Fill an engine's parameters by ``load``, and give layers in 4 bits what makes numbers of them. All ranks call it."""
    site = Site.model_validate(job.site)
    weights = first_weights(recipe, site, config_for(recipe, site, job.card), model, device)
    load(weights)
    if isinstance(recipe.adapter, Lora) and recipe.adapter.base == "nf4":
        from outgrow.trainers.adapters.nf4 import attach_quant_states
        from outgrow.trainers.models.quantised import QuantisedWeights

        assert isinstance(weights, AdaptedWeights) and isinstance(weights.base, QuantisedWeights)
        attach_quant_states(model, weights.base, device)


def first_weights(
    recipe: Recipe, site: Site, config: PretrainedConfig, model: PreTrainedModel, device: torch.device = _CPU
) -> TensorSource:
    """What the parameters are before the first step: a folder's, checked, or drawn from the seed; and an adapter's beside them.

    ``model`` is what ``build_model`` gave, whatever an engine has made of it since. A base in 4 bits is found or made on
    ``device``: then all ranks call it.
    """
    base = base_weights(recipe, site, config)
    if not isinstance(recipe.adapter, Lora):
        return base
    if recipe.adapter.base == "nf4":
        from outgrow.trainers.models.quantising import quantised_weights

        assert isinstance(base, FolderWeights), "combinations refuses 4 bits of weights that are drawn"
        base = quantised_weights(base, model, site, device)
    return AdaptedWeights(base, recipe, model)


def base_weights(recipe: Recipe, site: Site, config: PretrainedConfig) -> TensorSource:
    """The weights of the model as it is without an adapter: those of the recipe's folder, checked, or drawn from the seed."""
    if not isinstance(recipe.model, FolderModel):
        return SeededWeights(config, recipe.run.seed)
    whole = meta_model(config, recipe.precision)  # as the folder names it: without an adapter, not sharded
    folder = GrownWeights(weights_folder(site, recipe.model.path), whole)
    folder.check(whole)
    return folder


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all that is drawn on ``rank`` in ``step``: 63 bits, so that a resumed run draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1
