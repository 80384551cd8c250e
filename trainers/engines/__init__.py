"""Engines: how one rank turns batches into updates. ``make_engine`` picks the one that the layout names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outgrow.contracts import Layout
from outgrow.recipes.schema import Recipe
from outgrow.trainers.engines.engine import Engine, Mark, StepSums, unmarked
from outgrow.trainers.engines.fsdp2 import Fsdp2Engine
from outgrow.trainers.engines.plain import PlainEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Engine", "Mark", "StepSums", "make_engine", "unmarked"]


def make_engine(layout: Layout, recipe: Recipe, model: PreTrainedModel, device: torch.device) -> Engine:
    """The engine of ``layout`` around ``model``, whose parameters lie on meta and are uninitialised afterwards.

    AdamW's state is there, as zeros; ``load_model`` or ``load`` must come before the first batch.
    """
    if layout.engine == "plain":
        return PlainEngine(recipe, model, device)
    return Fsdp2Engine(layout, recipe, model, device)
