"""Every preset loads, holds nothing of one machine, and takes what its header says, on the machines that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models  # noqa: F401  # before transformers
from transformers import LlamaConfig

from outgrow.cluster import presets_page
from outgrow.cluster.fit import memory_refusals
from outgrow.recipes.combinations import refusals
from outgrow.recipes.layout import resolve
from outgrow.recipes.loading import load
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.recipes.site_loading import bind, load_site
from outgrow.recipes.yaml_marks import parse, strings
from outgrow.trainers.models.build import facts

PRESETS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "presets").glob("*.yaml"))
INSISTS = {"llama70b-full-offload": "zero", "llama8b-continue": "fsdp2"}
"""Presets that are about an engine."""


def targets() -> list[tuple[str, presets_page.Target]]:
    return [(name, target) for name, all_of_it in presets_page.TARGETS.items() for target in all_of_it]


def test_there_are_presets() -> None:
    assert {path.stem for path in PRESETS} == {"quickstart", *presets_page.TARGETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_is_of_no_machine(path: Path) -> None:
    recipe = load(path)
    assert recipe.run.name == path.stem
    assert recipe.parallel.kind == INSISTS.get(path.stem, "auto")
    texts = [text for _, text in strings(parse(path.read_text(), path.name)[0].data)]
    assert [text for text in texts if text.startswith(("/", "~")) or "://" in text or "localhost" in text] == []


def test_quickstart_binds_without_a_site_file_and_lays_out_on_few_and_many_ranks() -> None:
    path = next(path for path in PRESETS if path.stem == "quickstart")
    recipe = load(path)
    site = bind(load_site(None), recipe, path)
    assert Path(site.locate("python-stdlib"), "argparse.py").is_file()
    assert [resolve(recipe, world, world).shard for world in (1, 2, 8)] == [1, 2, 8]


@pytest.mark.parametrize(("name", "target"), targets(), ids=lambda value: str(value))
def test_preset_fits_the_machines_that_it_names(name: str, target: presets_page.Target) -> None:
    recipe = load(presets_page.FOLDER / f"{name}.yaml", target.overrides)
    assert refusals(recipe, "cuda") == []
    assert memory_refusals(recipe, presets_page.facts_of(recipe), presets_page.machine(target)) == []


@pytest.mark.parametrize("name", presets_page.TARGETS)
def test_figures_of_a_header_are_those_of_the_forecast(name: str) -> None:
    text = (presets_page.FOLDER / f"{name}.yaml").read_text()
    assert text.count(presets_page.BEGIN) == text.count(presets_page.END) == 1
    assert text == presets_page.with_header(text, presets_page.header(name)), "run: python -m outgrow.cluster.presets_page"


def test_page_is_fresh() -> None:
    assert presets_page.PAGE.read_text() == presets_page.page(), "run: python -m outgrow.cluster.presets_page"


def test_full_adamw_of_a_70b_says_what_it_keeps() -> None:
    recipe = load(presets_page.FOLDER / "llama70b-full-offload.yaml")
    found = presets_page.facts_of(recipe)
    assert found.parameters == 70_553_706_496
    assert presets_page.state_bytes(recipe, found) == pytest.approx(840e9, rel=0.01)
    (refusal,) = memory_refusals(recipe, found, presets_page.machine(presets_page.WORKSTATION))
    assert "of memory on a node (checkpoint 846.6 GB" in refusal.asked
    assert refusal.nearest == "add adapter='{kind: lora, base: nf4}'; or add parallel=fsdp2 and take 64 such GPUs"


@pytest.mark.parametrize("name", ["llama8b-continue", "llama70b-qlora", "scratch-350m", "russian-70b-lora"])
def test_facts_by_arithmetic_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    recipe = load(presets_page.FOLDER / f"{name}.yaml")
    site = Site(sources=config_folders(tmp_path), cache=str(tmp_path))
    if "70b" in name:  # three of its blocks tell as much as eighty
        recipe = of_three_blocks(recipe, tmp_path)
    found = facts(recipe, site)
    assert found.to_dict() == presets_page.facts_of(recipe).to_dict()


def of_three_blocks(recipe: Recipe, folder: Path) -> Recipe:
    keys = presets_page.SHAPES["llama-3-70b"]
    assert keys["num_hidden_layers"] == 80
    write_config(folder / "llama-3-70b", keys | {"num_hidden_layers": 3})
    presets_page.SHAPES["llama-3-70b"]["num_hidden_layers"] = 3  # undone by the fixture
    return recipe


@pytest.fixture(autouse=True)
def _shapes_stay() -> object:
    before = {name: dict(keys) for name, keys in presets_page.SHAPES.items()}
    yield
    for name, keys in before.items():
        presets_page.SHAPES[name].update(keys)


def config_folders(root: Path) -> dict[str, str]:
    """Folders with the configurations that the presets' models have, and no weights."""
    for name, keys in presets_page.SHAPES.items():
        write_config(root / name, keys)
    return {name: str(root / name) for name in presets_page.SHAPES}


def write_config(folder: Path, keys: dict[str, object]) -> None:
    LlamaConfig(**keys, max_position_embeddings=8192).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
