"""Every preset loads, and holds nothing of one machine: no absolute path, no host, no number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from outgrow.recipes.layout import resolve
from outgrow.recipes.loading import load
from outgrow.recipes.site_loading import bind, load_site
from outgrow.recipes.yaml_marks import parse, strings

PRESETS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "presets").glob("*.yaml"))


def test_there_are_presets() -> None:
    assert "quickstart" in [path.stem for path in PRESETS]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_is_of_no_machine(path: Path) -> None:
    recipe = load(path)
    assert recipe.parallel.kind == "auto"
    texts = [text for _, text in strings(parse(path.read_text(), path.name)[0].data)]
    assert [text for text in texts if text.startswith(("/", "~")) or "://" in text or "localhost" in text] == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_binds_without_a_site_file_and_lays_out_on_few_and_many_ranks(path: Path) -> None:
    recipe = load(path)
    site = bind(load_site(None), recipe, path)
    assert Path(site.locate("python-stdlib"), "argparse.py").is_file()
    assert [resolve(recipe, world, world).shard for world in (1, 2, 8)] == [1, 2, 8]
