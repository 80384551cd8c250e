"""From recipe.yaml and overrides to a ``Recipe``, or to every problem at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from outgrow.errors import Problem, RecipeError
from outgrow.recipes.explain import explain, in_order
from outgrow.recipes.overrides import apply
from outgrow.recipes.schema import Recipe
from outgrow.recipes.short_forms import expand
from outgrow.recipes.yaml_marks import Document, key_text, read, strings


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file with ``key.path=value`` overrides. Raises ``RecipeError`` with every problem and its place."""
    document, problems = apply(read(path, RecipeError), overrides)
    problems += _environment(document)
    try:
        # JSON, because its strict mode takes lists for tuples and still no '8' for 8.
        recipe = Recipe.model_validate_json(json.dumps(expand(document.data, Recipe)), strict=True)
    except ValidationError as error:
        problems += explain(error, document, Recipe)
    if problems:
        raise RecipeError(in_order(problems, document))
    return recipe


def _environment(document: Document) -> list[Problem]:
    return [
        Problem(where=document.where(path), key=key_text(path), message="${env:...} is for site.yaml alone; write the value")
        for path, text in strings(document.data)
        if "${env:" in text
    ]
