"""A build over a real Ray cluster: the same bytes as in one process, also where workers are killed meanwhile."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from text_recipes import make_recipe, make_site, text, text_stream
from tiny_runs import Place, tiny_place

from outgrow.contracts import DatasetCard
from outgrow.storage import tree_digests
from outgrow.streaming.build import build
from outgrow.streaming.sources import reading

PROGRAMS = str(Path(__file__).parents[1] / "ray_programs.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with tiny_place(tmp_path_factory.mktemp("ray")) as made:
        yield made


def said(place: Place, *words: str) -> Any:
    """What a program said in its last line."""
    process = place.start_program("log", sys.executable, PROGRAMS, *words)
    assert process.wait(200) == 0, place.log()
    return json.loads(place.log().splitlines()[-1])


def test_a_map_keeps_order_takes_little_ahead_and_tells_what_failed(place: Place, tmp_path: Path) -> None:
    found = said(place, "map_numbers", "2", str(tmp_path))
    assert found["squares"] == [number * number for number in range(40)]
    assert found["most"] <= 4
    assert found["made"] == found["ran"], "the work was made more than once in a worker, or for nothing"
    kind, message = found["errors"]["1001"]
    assert kind == "ClusterError" and "does not see the file" in message and f"{tmp_path}/gone.txt" in message
    assert found["errors"]["1002"] == ["OutgrowError", "here: wrong\n  mend it"]
    kind, message = found["errors"]["1003"]
    assert kind == "ClusterError" and "could not do a part of the work" in message


def test_the_same_bytes_as_one_process_though_workers_are_killed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03}.txt").write_text(text(number, 2000))
    tokenizer = {"kind": "train", "vocab_size": 320, "sample_bytes": 50_000}
    recipe = make_recipe(text_stream(), tokenizer=tokenizer, sequence_length=128)
    monkeypatch.setattr(reading, "UNIT_BYTES", 20_000)
    alone = make_site(tmp_path / "alone", prose=folder)
    expected = build(recipe, alone).card
    site = make_site(tmp_path / "ray", build_processes=4, prose=folder)
    (tmp_path / "inputs.json").write_text(json.dumps([recipe.to_dict(), site.to_dict()]))
    found = said(place, "build", "4", str(tmp_path / "inputs.json"), "kill")
    assert found["killed"] == 3
    assert DatasetCard.from_dict(found["card"]) == expected
    store = expected.store
    here, there = (tree_digests(Path(s.open_storage().path(store))) for s in (alone, site))
    assert here == there
