"""What a run would meet as it starts on this machine, found in seconds: no weights are loaded, no rank is started.

The worker checks each of these too, but only once the data are built and the ranks are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from outgrow.contracts import Refusal
from outgrow.errors import IntegrityError, OutgrowError
from outgrow.recipes.combinations import refusals
from outgrow.recipes.deepspeed import offloads_to_nvme
from outgrow.recipes.placed import weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.parallel import Zero
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.speed import WholeLogits
from outgrow.storage import Storage
from outgrow.trainers.adapters.identity import base_of, require_same_base
from outgrow.trainers.adapters.lora import adapt
from outgrow.trainers.checkpoint.catalog import Saved, survey
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.engines.forward import head_loss
from outgrow.trainers.extensions import require_tools
from outgrow.trainers.models.attention import set_attention
from outgrow.trainers.models.build import Vocabulary, config_for, meta_model
from outgrow.trainers.models.grown import GrownWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def obstacles(recipe: Recipe, site: Site, card: Vocabulary | None, device: str, run_folder: str | None) -> list[Refusal]:
    """Every reason found why the recipe could not start here on ``device``; ``run_folder``: the run that it would take up."""
    storage = site.open_storage()
    folder = weights_folder(site, recipe.model.path) if isinstance(recipe.model, FolderModel) else None
    saved = survey(storage, run_folder).saved if folder is not None and run_folder is not None else ()
    frozen = isinstance(recipe.adapter, Lora)
    # Made at most once, and not where no check looks at it.
    model = cache(lambda: meta_model(config_for(recipe, site, card), recipe.precision))
    checks: tuple[Callable[[], None], ...] = (
        # A checkpoint of a full run has all weights, and one of an adapter needs its base's.
        *([lambda: _require_weights(folder, model())] if folder is not None and (frozen or not saved) else []),
        *([lambda: _require_base(recipe, site, storage, saved)] if folder is not None and frozen else []),
        lambda: _require_forward(recipe, model, device),
        lambda: _require_compiler(recipe, device),
    )
    found = []
    for check in checks:
        try:
            check()
        except OutgrowError as error:
            asked = f"{error.where}: {error.message}" if error.where else error.message
            found.append(Refusal(asked=asked, available="", nearest=error.hint))
    return found


def _require_weights(folder: Path, model: PreTrainedModel) -> None:
    """The folder has every tensor of the model, in its shape, by the headers of its files."""
    GrownWeights(folder, model).check(model, values=False)


def _require_base(recipe: Recipe, site: Site, storage: Storage, saved: Sequence[Saved]) -> None:
    """The newest checkpoint that can be opened stands beside the base that there is now."""
    for one in saved:
        try:
            base = open_checkpoint(storage, one.ref).base
        except (IntegrityError, FileNotFoundError):  # damaged, or gone meanwhile: the one before is taken up
            continue
        return require_same_base(base, base_of(recipe, site), one.ref.folder)


def _require_forward(recipe: Recipe, model: Callable[[], PreTrainedModel], device: str) -> None:
    """Attention and loss that are asked for are such that model and device can compute them, where no rule says no already.

    Puts the recipe's adapter into what ``model`` gives. What is not asked for is not looked at: a driver then leaves
    the GPU alone.
    """
    if refusals(recipe, device):
        return
    if not isinstance(recipe.cross_entropy, WholeLogits):
        adapt(model(), recipe)
        head_loss(model(), recipe)
    if recipe.attention != "auto" and (device == "cpu" or torch.cuda.is_available()):
        set_attention(model(), recipe.attention, recipe.precision, torch.device(device))


def _require_compiler(recipe: Recipe, device: str) -> None:
    """What offload to a disk compiles can be compiled."""
    if isinstance(recipe.parallel, Zero) and offloads_to_nvme(recipe.parallel):
        require_tools(device)
