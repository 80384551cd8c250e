"""A build over a real Ray cluster: the same bytes as in one process, also where workers are killed meanwhile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from text_recipes import make_recipe, make_site, text_stream, write_texts
from tiny_runs import tiny_place

from outgrow.contracts import DatasetCard
from outgrow.recipes.schema import Recipe
from outgrow.storage import tree_digests
from outgrow.streaming.build import build
from outgrow.streaming.sources import reading

PROGRAMS = str(Path(__file__).parents[1] / "ray_programs.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    """A recipe of 40 files of 20 KB."""
    write_texts(folder / "prose", 40, num_words=2000)
    tokenizer = {"kind": "train", "vocab_size": 320, "sample_bytes": 50_000}
    return make_recipe(text_stream(), tokenizer=tokenizer, sequence_length=128)


@pytest.fixture(scope="module")
def seen(folder: Path, recipe: Recipe) -> Any:
    """What the programs saw, both on one embedded cluster of three CPUs."""
    (folder / "map").mkdir()
    site = make_site(folder / "cluster", build_processes=3, prose=folder / "prose")
    (folder / "inputs.json").write_text(json.dumps([recipe.to_dict(), site.to_dict()]))
    words = {"map_numbers": [str(folder / "map")], "build": [str(folder / "inputs.json")]}
    (folder / "place").mkdir()
    with tiny_place(folder / "place") as place:
        process = place.start_program("log", sys.executable, PROGRAMS, "3", json.dumps(words))
        assert process.wait(250) == 0, place.log()
        return json.loads(place.log().splitlines()[-1])


def test_a_map_keeps_order_takes_little_ahead_and_tells_what_failed(seen: Any, folder: Path) -> None:
    found = seen["map_numbers"]
    assert found["squares"] == [number * number for number in range(40)]
    assert found["most"] <= 4
    assert found["made"] == found["ran"], "the work was made more than once in a worker, or for nothing"
    kind, message = found["errors"]["1001"]
    assert kind == "ClusterError" and "does not see the file" in message and f"{folder}/map/gone.txt" in message
    assert found["errors"]["1002"] == ["OutgrowError", "here: wrong\n  mend it"]
    kind, message = found["errors"]["1003"]
    assert kind == "ClusterError" and "could not do a part of the work" in message


def test_the_same_bytes_as_one_process_though_workers_are_killed(
    seen: Any, folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "UNIT_BYTES", 20_000)
    alone = make_site(folder / "alone", prose=folder / "prose")
    expected = build(recipe, alone).card
    assert seen["build"]["killed"] == 2
    assert DatasetCard.from_dict(seen["build"]["card"]) == expected
    built = folder / "cluster" / "storage" / expected.store
    assert tree_digests(built) == tree_digests(Path(alone.open_storage().path(expected.store)))
