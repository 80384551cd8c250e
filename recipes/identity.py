"""Which keys of a recipe make a run the run that it is: its fingerprint, and what a changed key means for a resume.

``VERDICTS`` classifies every key of the schema once (a test holds it complete). The fingerprint is over ``LEARNED``: what
decides which numbers are learned from which rows, and no key of a site. Learning rate and schedule are not in it, so that a
run whose learning rate was changed on request stays the same run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from outgrow import storage
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import NoAdapter
from outgrow.recipes.short_forms import expand
from outgrow.recipes.yaml_marks import KeyPath, key_text

Verdict: TypeAlias = Literal["extend", "accept", "refuse"]

FORMAT = 2
"""Grows when the same recipe is to give another fingerprint."""

VERDICTS: dict[str, tuple[Verdict, str]] = {
    "schema": ("refuse", "another format of recipe"),
    "run.name": ("refuse", "another name is another run"),
    "run.seed": ("refuse", "weights and the order of rows are drawn from it"),
    "model": ("refuse", "its checkpoints hold another model"),
    "adapter": ("refuse", "its checkpoints hold other parameters"),
    "data.sequence_length": ("refuse", "rows would be cut elsewhere"),
    "data.tokenizer": ("refuse", "tokens would mean something else"),
    "data.streams": ("refuse", "other data, or another mix of them"),
    "data.stages": ("refuse", "steps would hold other rows; to make the last stage longer, raise duration"),
    "data.duplicates": ("refuse", "other documents would be left out"),
    "data.validation_fraction": ("refuse", "documents would move between training and validation"),
    "data.compression": ("refuse", "the token store would be another"),
    "data.shard_bytes": ("refuse", "the order of rows follows the shards"),
    "data.window_shards": ("refuse", "the order of rows follows the windows"),
    "data.loader_workers": ("extend", "the same rows, read by more or fewer processes"),
    "data.on_bad_shard": ("extend", "the same rows, until a shard is found damaged"),
    "objective": ("refuse", "another loss"),
    "batch.rows": ("refuse", "steps would hold other rows"),
    "batch.micro_rows": ("extend", "the same step in other portions"),
    "duration": ("extend", "the run ends earlier or later"),
    "optimizer.kind": ("refuse", "its checkpoints hold the state of another optimizer"),
    "optimizer": ("accept", "the loss takes another course from here"),
    "schedule": ("accept", "the loss takes another course from here"),
    "precision": ("refuse", "the arithmetic is another"),
    "attention": ("accept", "another kernel rounds otherwise"),
    "cross_entropy": ("accept", "the same loss, summed in another order"),
    "compile": ("accept", "compiled kernels round otherwise"),
    "activation_offload": ("extend", "the same activations, kept elsewhere"),
    "activation_checkpointing": ("extend", "the same gradients, computed twice or kept"),
    "deterministic": ("accept", "kernels may round otherwise"),
    "validation": ("extend", "the run is measured more or less often"),
    "validation.on_rise": ("extend", "from here on the run ends, or goes back, at another rise"),
    "checkpoint": ("extend", "the run is saved more or less often, or other checkpoints are kept"),
    "logging": ("extend", "the run is shown more or less often"),
    "profile": ("extend", "the same steps, some of them looked at"),
    "parallel": ("extend", "the same rows and loss on other ranks"),
}
"""What a change means, of the key and all below it that has no entry of its own: ``extend`` is taken, ``accept`` is taken on
request, ``refuse`` never."""

LEARNED = (
    "run.seed",
    "model",
    "data.sequence_length",
    "data.tokenizer",
    "data.window_shards",
    "data.stages",
    "objective",
    "batch.rows",
    "precision",
)
"""Keys in the fingerprint, beside the streams' epochs and shares. The other refused keys of ``data`` are in it through the
fingerprint of the data, which follows from documents, choice and cuts."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One changed key: values as plain data, None where a side does not have the key."""

    key: str
    old: Any
    new: Any
    verdict: Verdict
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new} ({self.why})"


def fingerprint(recipe: Recipe, data_fingerprint: str) -> str:
    """sha256 of what is learned: the content of the data (``DatasetCard.data_fingerprint``), their mix, and ``LEARNED``."""
    data = recipe.to_dict()
    learned = {key: _get(data, key) for key in LEARNED}
    if recipe.adapter != NoAdapter():  # not asked before there were adapters: runs from then keep their names
        learned["adapter"] = data["adapter"]
    mix = {stream.name: [stream.epochs, stream.share] for stream in recipe.data.streams}
    return storage.fingerprint({"format": FORMAT, "data": data_fingerprint, "mix": mix, "learned": learned})


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """What changed from ``old`` to ``new``, both as ``Recipe.to_dict`` gives them, in the order of the recipe.

    A key that came into the schema after ``old`` was written counts as its default there.
    """
    with contextlib.suppress(ValidationError):  # written before a key was renamed: compared as it is
        old = Recipe.model_validate(expand(old, Recipe)).to_dict()
    return [
        Difference(key=key_text(path), old=before, new=after, verdict=verdict, why=why)
        for path, before, after in _changes(old, new, ())
        for verdict, why in [classify(path)]
    ]


def classify(path: KeyPath) -> tuple[Verdict, str]:
    """The verdict of a key path and its reason. Raises ``KeyError`` for a key that no entry covers."""
    names = [str(part) for part in path if isinstance(part, str)]
    for depth in range(len(names), 0, -1):
        if found := VERDICTS.get(".".join(names[:depth])):
            return found
    raise KeyError(key_text(path))


def _changes(old: Any, new: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, after, (*path, index))
    elif type(old) is not type(new) or old != new:
        yield path, old, new


def _get(data: dict[str, Any], key: str) -> Any:
    value: Any = data
    for part in key.split("."):
        value = value[part]
    return value
