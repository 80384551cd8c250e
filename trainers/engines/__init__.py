"""Engines: how one rank turns batches into updates. ``make_engine`` picks the one that the layout names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outgrow.contracts import Layout
from outgrow.recipes import combinations
from outgrow.recipes.deepspeed import Folders
from outgrow.recipes.deepspeed import folders as zero_folders
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.trainers.engines.ddp import DdpEngine
from outgrow.trainers.engines.engine import Engine, Mark, StepSums, unmarked
from outgrow.trainers.engines.fsdp2 import Fsdp2Engine
from outgrow.trainers.engines.plain import PlainEngine
from outgrow.trainers.models.experts import mixtures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Engine", "Mark", "StepSums", "make_engine", "unmarked"]


def make_engine(
    layout: Layout, recipe: Recipe, model: PreTrainedModel, device: torch.device, folders: Folders | None = None
) -> Engine:
    """The engine of ``layout`` around ``model``, whose parameters lie on meta and are uninitialised afterwards.

    The optimizer's state is there, as zeros; ``load_model`` or ``load`` must come before the first batch. ``folders`` are where
    the engine ``zero`` may write; by default those of a site that says nothing. Raises ``PlanError`` with everything in the
    recipe that cannot be had together on this device.
    """
    combinations.require(recipe, device.type, shares_experts=layout.world > 1 and bool(mixtures(model)))
    if layout.engine == "plain":
        return PlainEngine(recipe, model, device)
    if layout.engine == "ddp":
        return DdpEngine(layout, recipe, model, device)
    if layout.engine == "zero":
        from outgrow.trainers.engines.zero import ZeroEngine  # DeepSpeed takes seconds to import

        return ZeroEngine(layout, recipe, model, device, folders or zero_folders(recipe, Site()))
    return Fsdp2Engine(layout, recipe, model, device)
