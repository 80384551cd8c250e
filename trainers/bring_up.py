"""What happens on a rank before its first step: the process is set up, and a model gets memory and weights or a checkpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import CheckpointRef, JobSpec, Layout
from outgrow.errors import IntegrityError
from outgrow.monitoring.recording.recorder import Recorder
from outgrow.recipes.placed import weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import Refused, survey
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.checkpoint.resume import gather_texts, resume
from outgrow.trainers.engines import Engine, make_engine
from outgrow.trainers.models.build import config_for, meta_model
from outgrow.trainers.models.grown import GrownWeights
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.progress import Progress
from outgrow.trainers.regions import TensorSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Started:
    """A filled engine, how far its weights have come, and the checkpoints that were passed over as not whole."""

    engine: Engine
    progress: Progress
    refused: tuple[Refused, ...]


def finished(storage: Storage, run_folder: str, steps: int, rank: int) -> Progress | None:
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


def prepare_process(job: JobSpec, recipe: Recipe, local_rank: int) -> torch.device:
    """The device of this rank, after threads, deterministic kernels and the current device are set for the whole process."""
    torch.set_num_threads(job.threads_per_worker)
    torch.use_deterministic_algorithms(recipe.deterministic)
    # Every value is written before it is read; filling fresh memory with NaN first costs a pass over each buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if job.device != "cuda":
        return torch.device(job.device)
    # Read by cuBLAS at its first use: without a workspace of fixed size its results differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def build_model(job: JobSpec, recipe: Recipe) -> PreTrainedModel:
    """The recipe's model, its parameters on meta. Raises ``ModelError`` for a configuration or a folder that does not fit."""
    return meta_model(config_for(recipe, Site.model_validate(job.site), job.card), recipe.precision)


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
    folder that does not fit, ``IntegrityError`` where no checkpoint is whole, ``RunError`` where the checkpoint was trained on
    other rows.
    """
    from outgrow.streaming.loader import check_state

    site = Site.model_validate(job.site)
    engine = make_engine(layout, recipe, model, device)
    recorder.enter("restore")
    resumed = resume(storage, job.run.folder, engine.load)
    recorder.enter("init")
    if resumed.reader is None:
        engine.load_model(first_weights(recipe, site, config_for(recipe, site, job.card), model))
        return Started(engine, Progress(), resumed.refused)
    step = check_state(resumed.reader.loader_state, job)
    return Started(engine, Progress(step, resumed.reader.manifest.metrics), resumed.refused)


def first_weights(recipe: Recipe, site: Site, config: PretrainedConfig, model: PreTrainedModel) -> TensorSource:
    """What the parameters are before the first step: a folder's, checked against ``model``, or drawn from the seed."""
    if isinstance(recipe.model, FolderModel):
        folder = GrownWeights(weights_folder(site, recipe.model.path), model)
        folder.check(model)
        return folder
    return SeededWeights(config, recipe.run.seed)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all that is drawn on ``rank`` in ``step``: 63 bits, so that a resumed run draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1
