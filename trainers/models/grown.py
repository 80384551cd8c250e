"""A folder's weights for a vocabulary that the recipe made larger, by tags and tokens of chat templates the model never saw.

The rows that embedding and head lack are the mean of those that they have: a new token then begins as an average one, and the
scores of the others hardly move (Hewitt 2021, "Initializing New Word Embeddings"). Nothing is drawn, so the model is the same
on any number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from outgrow.recipes.schema.data import Data
from outgrow.recipes.schema.streams import TokenizerTemplate
from outgrow.trainers.models.weights import FolderWeights, row_parts
from outgrow.trainers.regions import Region

_TOKENS_OF_A_TEMPLATE = 32
"""No chat template that outgrow knows needs a third of them; how many one of the user's names is not known here."""


def most_added_tokens(data: Data) -> int:
    """How many tokens a recipe may add to its tokenizer at most; a tokenizer that has still more is another one."""
    tags = {stream.tag for stream in data.streams if stream.tag}
    templates = {stream.chat.template for stream in data.streams if not isinstance(stream.chat.template, TokenizerTemplate)}
    return len(tags) + _TOKENS_OF_A_TEMPLATE * len(templates)


class GrownWeights(FolderWeights):
    """``FolderWeights`` whose embedding and head have as many rows as those of ``model``, which may be on meta."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        super().__init__(folder)
        modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
        grown = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
        named = model.named_parameters(remove_duplicate=False)
        self._rows = {name: parameter.shape[0] for name, parameter in named if id(parameter) in grown}
        self._means: dict[str, torch.Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return (max(shape[0], self._rows[name]), *shape[1:]) if name in self._rows else shape

    def read(self, name: str, region: Region) -> torch.Tensor:
        if name not in self._rows or self.shape(name) == super().shape(name):
            return super().read(name, region)
        whole = Region.whole(super().shape(name))
        known = region.intersect(whole)
        new = region.shape[0] - (known.shape[0] if known else 0)
        parts = [super().read(name, known)] if known else []
        if new:
            parts.append(self._mean(name)[region.slices[1:]].expand(new, *region.shape[1:]))
        return torch.cat(parts)

    def _mean(self, name: str) -> torch.Tensor:
        """The mean of the rows that the folder has, in the file's dtype."""
        if name not in self._means:
            shape = super().shape(name)
            total = torch.zeros(shape[1:], dtype=torch.float64)
            for part in row_parts(shape):
                rows = super().read(name, part)
                total += rows.sum(dim=0, dtype=torch.float64)
            self._means[name] = (total / shape[0]).to(rows.dtype)
        return self._means[name]
