"""Errors cross processes whole, and say where, what and what to do."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from outgrow import errors
from outgrow.errors import OutgrowError, Problem, RecipeError, ShardError, TrainingError


def tree(kind: type[OutgrowError]) -> Iterator[type[OutgrowError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from tree(below)


PUBLIC = [kind for kind in tree(OutgrowError) if not kind.__name__.startswith("_") and kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", PUBLIC)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind: type[OutgrowError], protocol: int) -> None:
    own: dict[str, Any] = {"stream": "books", "shard": 3} if kind is ShardError else {}
    error = kind("3 ranks", where="recipe.yaml:3", hint="run with 2", **own)
    error.__cause__ = ValueError("inner")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is kind
    assert str(back) == str(error) == "recipe.yaml:3: 3 ranks\n  run with 2"
    assert back.__dict__ == error.__dict__
    assert back.args == error.args
    assert str(copy.deepcopy(error)) == str(error)


def test_the_problems_of_a_file_survive_pickling() -> None:
    problems = [
        Problem(where="r.yaml:1", key="batch.rows", message="given 0"),
        Problem(where="r.yaml:9", key="", message="bad"),
    ]
    back = pickle.loads(pickle.dumps(RecipeError(problems, hint="see docs/recipe.md")))
    assert back.problems == tuple(problems)
    assert str(back) == "r.yaml:1: batch.rows: given 0\nr.yaml:9: bad\n  see docs/recipe.md"


def test_a_subclass_with_arguments_of_its_own_survives_pickling() -> None:
    back = pickle.loads(pickle.dumps(LostRank(rank=3)))
    assert isinstance(back, LostRank)
    assert (back.rank, str(back)) == (3, "rank 3 is gone")


class LostRank(TrainingError):
    def __init__(self, *, rank: int) -> None:
        super().__init__(f"rank {rank} is gone")
        self.rank = rank


def test_the_drawing_in_the_module_is_the_tree() -> None:
    drawn = [line.split("── ") for line in (errors.__doc__ or "").splitlines() if "──" in line]
    parents: dict[int, str] = {}
    found = []
    for indent, text in drawn:
        name, depth = text.split()[0], len(indent)
        found.append((name, parents.get(depth - 4, "OutgrowError")))
        parents[depth] = name
    assert found == [(kind.__name__, next(base.__name__ for base in kind.__mro__[1:] if base in PUBLIC)) for kind in PUBLIC[1:]]


def test_every_error_says_what_it_is_for() -> None:
    assert all(inspect.getdoc(kind) and kind.__doc__ for kind in PUBLIC)
