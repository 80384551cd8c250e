"""What a recipe file and its overrides become; strict YAML against the values that YAML 1.1 would have made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.errors import RecipeError
from outgrow.recipes.loading import load
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Fsdp2
from outgrow.recipes.yaml_marks import key_path, key_text, parse

RECIPE = """\
schema: 1
run: {name: tiny, seed: 7}
model: {kind: architecture, family: llama, config: {hidden_size: 64, rope_theta: 1e4}}
data:
  sequence_length: 1_024
  tokenizer: {kind: train, vocab_size: 300}
  streams:
    - name: code
      source: {kind: text, path: corpus, include: [no, 2026-11-21, "*.py"]}
batch: {rows: 8}
duration: {steps: 5}
optimizer: {learning_rate: 1e-3}
"""


TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=100)
"""json.dumps writes what lies beyond as two surrogates, which YAML does not join; a YAML key has at most 1,024 characters."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def values(text: str) -> Any:
    document, problems = parse(text, "x")
    assert not problems
    return document.data


def test_values_are_what_they_look_like(path: Path) -> None:
    recipe = load(path)
    assert recipe.data.sequence_length == 1024
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.to_dict()["model"]["config"] == {"hidden_size": 64, "rope_theta": 10000.0}
    assert recipe.to_dict()["data"]["streams"][0]["source"]["include"] == ["no", "2026-11-21", "*.py"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("on", "on"),
        ("True", "True"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("+3", 3),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        (".nan", ".nan"),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("_1", "_1"),
        ("{a: [1, {b: c}]}", {"a": [1, {"b": "c"}]}),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    assert values(text) == value
    assert type(values(text)) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
        max_leaves=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_json_is_read_as_itself(value: Any) -> None:
    assert values(json.dumps(value)) == value


@given(st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_text_is_data_or_a_problem_with_a_place(text: str) -> None:
    document, problems = parse(text, "x")
    assert all(problem.where.startswith("x") and problem.message for problem in problems)
    json.dumps(document.data)


def test_places_are_lines_of_keys() -> None:
    document, _ = parse("a: 1\nb:\n  - c: 2\n  -\n    d: 3\n", "f")
    assert document.places == {
        (): "f:1",
        ("a",): "f:1",
        ("b",): "f:2",
        ("b", 0): "f:3",
        ("b", 0, "c"): "f:3",
        ("b", 1): "f:5",
        ("b", 1, "d"): "f:5",
    }
    assert document.where(("b", 1, "x", "y")) == "f:5"


@pytest.mark.parametrize("key", ["a", "a.b", "a[0].b", "a[0][12].c"])
def test_key_paths_go_there_and_back(key: str) -> None:
    assert key_text(key_path(key)) == key


def test_overrides_apply_in_order(path: Path) -> None:
    overrides = [
        "batch.rows=16",
        "batch.rows=32",
        "batch.micro_rows=4",
        "data.streams[0].name=first",
        "data.streams.0.source.path=other",
        "duration={tokens: 1000}",
        "schedule.kind=linear",
        "optimizer.betas=[0.8, 0.9]",
        "validation.every_steps=3",
        "parallel=auto",
    ]
    recipe = load(path, overrides)
    assert (recipe.batch.rows, recipe.batch.micro_rows) == (32, 4)
    assert recipe.data.streams[0].name == "first"
    assert recipe.to_dict()["data"]["streams"][0]["source"]["path"] == "other"
    assert (recipe.duration.tokens, recipe.duration.steps) == (1000, None)
    assert recipe.schedule.kind == "linear"
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.validation.every_steps == 3


def test_an_override_may_replace_a_short_form(path: Path) -> None:
    path.write_text(RECIPE + "parallel: auto\n")
    recipe = load(path, ["parallel.kind=fsdp2", "parallel.shard=2"])
    assert recipe.parallel == Fsdp2(kind="fsdp2", shard=2)


def test_a_recipe_goes_through_plain_data(path: Path) -> None:
    recipe = load(path, ["parallel={kind: fsdp2}", "optimizer.betas=[0.5, 0.25]"])
    data = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.model_validate(data) == recipe
    assert data["schema"] == 1


def test_a_recipe_is_frozen_and_the_file_is_not_changed_by_overrides(path: Path) -> None:
    recipe = load(path, ["batch.rows=9"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.batch.rows = 3  # type: ignore[misc]
    assert load(path).batch.rows == 8


def test_a_mistake_below_a_right_file_does_not_hide_behind_the_first_load(path: Path) -> None:
    load(path)
    with pytest.raises(RecipeError):
        load(path, ["batch.rows=0"])


def test_a_byte_order_mark_and_windows_line_ends_are_read(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load(path).run.name == "tiny"


def test_a_recipe_check_imports_nothing_heavy(path: Path) -> None:
    code = (
        "import sys; from outgrow.cli import recipe; from pathlib import Path; "
        f"recipe.check(Path({str(path)!r}), ['batch.rows=4']); recipe.schema(); "
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'streaming', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{path}: no mistakes")
