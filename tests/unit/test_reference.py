"""The reference pages are fresh and whole, and the JSON Schemas agree with the loader."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from outgrow.recipes import reference
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.section import Section
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema_types import leaves
from outgrow.recipes.yaml_marks import parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(reference.files()))
def test_generated_files_are_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == reference.files()[name], "run: python -m outgrow.recipes.reference"


@pytest.mark.parametrize("root", [Recipe, Site])
def test_every_key_has_a_meaning_and_stands_on_the_page(root: type[Section]) -> None:
    text = reference.page(root, "x", "")
    for leaf in leaves(root):
        assert f"| `{leaf.key}` |" in text
        assert leaf.field.description or leaf.key.endswith("kind"), f"{leaf.key} has no docstring"


@pytest.mark.parametrize("preset", sorted((ROOT / "recipes" / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_fit_the_json_schema(preset: Path) -> None:
    data = parse(preset.read_text(), "preset")[0].data
    validator = jsonschema.Draft202012Validator(reference.json_schema(Recipe))
    validator.validate(data)
    for wrong in ({"schema": 2}, {"batch": {"rows": 0}}, {"batch": {"row": 1}}, {"parallel": "fsdp"}):
        assert not validator.is_valid(data | wrong)
    assert validator.is_valid(data | {"parallel": "auto"})


def test_json_schemas_are_valid_json_schemas() -> None:
    for root in (Recipe, Site):
        schema = json.loads(json.dumps(reference.json_schema(root)))
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False
