"""Which modules of a model an adapter touches: the linear layers that get one, and the modules that are trained whole.

Pure: reads names and shapes of a model that may lie on meta, before anything is changed in it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from outgrow.errors import ModelError
from outgrow.recipes.schema.adapter import Lora
from outgrow.trainers.models.families import blocks

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Chosen:
    """Full names of modules, in the order of the model.

    ``adapted`` are linear layers with an adapter beside them; ``whole`` are modules whose parameters, and their children's, are
    trained themselves; ``linear`` are all linear layers of the blocks that stay frozen, with an adapter or without.
    """

    adapted: tuple[str, ...]
    whole: tuple[str, ...]
    linear: tuple[str, ...]


def choose(model: nn.Module, adapter: Lora) -> Chosen:
    """What the patterns of ``adapter`` choose in ``model``.

    Raises ``ModelError`` for a pattern that matches nothing, with the names there are, and for a module that is chosen as both.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    in_blocks = {id(module) for block in blocks(model) for module in block.modules()}
    trained = [name for name, module in modules.items() if next(module.parameters(), None) is not None]
    whole = _matching(adapter.fully_trained, trained, "fully_trained", "module")
    if adapter.targets == "all-linear":
        adapted = [name for name, module in linear.items() if id(module) in in_blocks and not within(name, whole)]
        if not adapted:
            raise ModelError(
                "all-linear finds no layer that is not trained whole already",
                where="adapter.targets",
                hint="adapter: none",
            )
    else:
        adapted = _matching(adapter.targets, list(linear), "targets", "linear layer")
    both = [name for name in adapted if within(name, whole)]
    if both:
        raise ModelError(
            f"{', '.join(_grouped(both))}: chosen by targets and by fully_trained; a module is one or the other",
            where="adapter",
            hint="make the patterns narrower",
        )
    _refuse_tied(model, linear, adapted)
    frozen = [name for name, module in linear.items() if id(module) in in_blocks and not within(name, whole)]
    return Chosen(tuple(adapted), tuple(whole), tuple(frozen))


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` fits a module's full name or its last parts: ``q_proj``, ``mlp.*``, ``model.layers.1?.*``."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def _matching(patterns: Iterable[str], names: list[str], key: str, what: str) -> list[str]:
    """The ``names`` that a pattern matches, in their own order; ``ModelError`` with every pattern that matches none."""
    found = {pattern: [name for name in names if matches(pattern, name)] for pattern in patterns}
    lost = [pattern for pattern, matched in found.items() if not matched]
    if lost:
        known = {part for name in names for part in (name, name.rpartition(".")[2])}
        near = difflib.get_close_matches(lost[0], sorted(known), n=1)
        raise ModelError(
            f"no {what} is called {', '.join(map(repr, lost))}; there are: {', '.join(_grouped(names))}",
            where=f"adapter.{key}",
            hint=f"did you mean {near[0]}?" if near else "",
        )
    chosen = {name for matched in found.values() for name in matched}
    return [name for name in names if name in chosen]


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of ``modules``, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _grouped(names: Iterable[str]) -> list[str]:
    """Names with the numbers of layers as ``*``, each once."""
    return list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))


def _refuse_tied(model: nn.Module, linear: Mapping[str, nn.Module], adapted: Iterable[str]) -> None:
    holders: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    for name in adapted:
        others = holders[id(linear[name].weight)] - {name}
        if others:
            raise ModelError(
                f"{name} shares its weights with {', '.join(sorted(others))}; an adapter on one of them would untie them",
                where="adapter.targets",
                hint=f"fully_trained: [{name.rpartition('.')[2]}] trains both together",
            )
