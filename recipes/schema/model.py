"""``model``: an architecture made from nothing, a folder of weights, or a module of the user's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Custom, Section, SourceName


class ArchitectureModel(Section):
    """A model made from nothing: every parameter is drawn from the seed and its name."""

    kind: Literal["architecture"]
    family: str = Field(pattern=r"^[a-z0-9_]+$")
    """The ``model_type`` of transformers: llama, mistral, qwen3, gemma2, mixtral, or what passed ``outgrow model check``."""
    config: dict[str, Any] = {}
    """Keys of the family's transformers configuration (hidden_size, num_hidden_layers, ...); the vocabulary size and the
    special tokens come from the dataset."""


class FolderModel(Section):
    """Weights to go on from: a local Hugging Face folder of safetensors."""

    kind: Literal["folder"]
    path: SourceName
    """A name that the site maps to a folder, or a folder relative to the recipe."""


class CustomModel(Custom):
    """An architecture of yours: ``factory(vocab_size=, **options)`` makes the model; docs/custom.md says what it must have."""


Model = Annotated[ArchitectureModel | FolderModel | CustomModel, Field(discriminator="kind")]
