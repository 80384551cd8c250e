"""A build that is killed: no dataset is visible, its processes end, and the next one goes on with what is finished and gives
the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from text_recipes import make_recipe, make_site, text, text_stream

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import tree_digests
from outgrow.streaming.build import build, find
from outgrow.streaming.store import Progress

_UNIT_BYTES = 20_000
_PART_DOCUMENTS = 5

_SCRIPT = f"""
import json, sys
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming import build as builder
from outgrow.streaming import parts
from outgrow.streaming.build import build
from outgrow.streaming.sources import reading

builder.UNIT_BYTES = reading.UNIT_BYTES = {_UNIT_BYTES}  # many units from little text
parts.PART_DOCUMENTS = {_PART_DOCUMENTS}

if __name__ == "__main__":
    recipe, site = json.load(open(sys.argv[1]))
    build(Recipe.model_validate(recipe), Site.model_validate(site), progress=lambda p: print(p.stage, flush=True))
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and the folder of its 1 MB of text, 50 units for two processes."""
    root = tmp_path_factory.mktemp("kill")
    folder = root / "prose"
    folder.mkdir()
    paragraph = text(1, 400)
    for number in range(50):
        (folder / f"{number:03}.txt").write_text(text(number, 100) + paragraph * 6)
    tokenizer = {"kind": "train", "vocab_size": 320, "sample_bytes": 50_000}
    return make_recipe(text_stream(), tokenizer=tokenizer, sequence_length=128), folder


def started(root: Path, recipe: Recipe, site: Site) -> subprocess.Popen[str]:
    (root / "build.py").write_text(_SCRIPT)
    (root / "inputs.json").write_text(json.dumps([recipe.to_dict(), site.to_dict()]))
    command = [sys.executable, str(root / "build.py"), str(root / "inputs.json")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], stage: str, times: int = 1) -> Iterator[str]:
    """The lines of the process up to the one that says ``stage`` so often."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()
        times -= line.strip() == stage
        if not times:
            return
    raise AssertionError(f"the build ended before {stage}")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process cuts units and parts as the script does."""
    for module in ("build", "sources.reading"):
        monkeypatch.setattr(f"outgrow.streaming.{module}.UNIT_BYTES", _UNIT_BYTES)
    monkeypatch.setattr("outgrow.streaming.parts.PART_DOCUMENTS", _PART_DOCUMENTS)


@pytest.fixture(scope="module")
def reference(work: tuple[Recipe, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetCard, dict[str, str]]:
    """The card and the digests of a build that nobody disturbs."""
    recipe, folder = work
    site = make_site(tmp_path_factory.mktemp("untouched"), prose=folder)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "sources.reading"):
            patch.setattr(f"outgrow.streaming.{module}.UNIT_BYTES", _UNIT_BYTES)
        patch.setattr("outgrow.streaming.parts.PART_DOCUMENTS", _PART_DOCUMENTS)
        card = build(recipe, site).card
    return card, tree_digests(Path(site.open_storage().path(card.store)))


def wait_for_end(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


Reference = tuple[DatasetCard, dict[str, str]]


def test_kill_9_of_a_build_leaves_its_finished_parts_and_the_next_one_goes_on(
    tmp_path: Path, work: tuple[Recipe, Path], reference: Reference, small: None
) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=2, prose=folder)
    with started(tmp_path, recipe, site) as process:
        list(until(process, "tokens", 23))
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
    datasets = Path(site.open_storage().path("datasets"))
    (left,) = datasets.iterdir()
    assert left.name.startswith(".unfinished-")
    assert find(recipe, site) is None
    wait_for_end(children, 30)
    finished = len(list((left / "parts" / "prose").iterdir()))
    assert finished >= 4, "the first 20 units are 4 parts"
    written = sorted((left / "store").rglob("documents/*"))

    seen: list[Progress] = []
    result = build(recipe, site, progress=seen.append)
    assert result.built
    blocks = [progress for progress in seen if progress.stage == "tokens"]
    assert len(blocks) == 50 - finished * _PART_DOCUMENTS, "units of finished parts were tokenised again"
    assert blocks[0].found_bytes == sum(path.stat().st_size for path in sorted(folder.iterdir())[: finished * _PART_DOCUMENTS])
    assert blocks[-1].done_bytes == blocks[-1].total_bytes
    assert not any(progress.stage == "tokenizer" for progress in seen), "the tokenizer was trained again"
    assert sorted(path.name for path in datasets.iterdir()) == sorted([Path(result.card.store).name, "by-recipe"])
    assert written and reference == (result.card, tree_digests(datasets.parent / result.card.store))


def test_kill_9_while_the_index_is_made_changes_no_byte(
    tmp_path: Path, work: tuple[Recipe, Path], reference: Reference, small: None
) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=1, prose=folder)
    with started(tmp_path, recipe, site) as process:
        list(until(process, "index"))
        process.kill()
    assert find(recipe, site) is None
    card = build(recipe, site).card
    assert reference == (card, tree_digests(Path(site.open_storage().path(card.store))))


def test_kill_9_of_one_of_its_processes_ends_the_build_with_a_reason(
    tmp_path: Path, work: tuple[Recipe, Path], small: None
) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=2, prose=folder)

    blocks = 0

    def kill_a_process(progress: Progress) -> None:
        nonlocal blocks
        blocks += progress.stage == "tokens"
        if blocks == 8:
            for child in multiprocessing.active_children()[:1]:
                child.kill()

    with pytest.raises(DataError, match="a process of the build was killed"):
        build(recipe, site, progress=kill_a_process)
    (left,) = Path(site.open_storage().path("datasets")).iterdir()
    assert left.name.startswith(".unfinished-"), "a part was finished, and is kept"


def test_a_second_build_of_the_same_dataset_waits_and_finds_it_done(
    tmp_path: Path, work: tuple[Recipe, Path], small: None
) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=1, prose=folder)
    seen: list[Progress] = []
    with started(tmp_path, recipe, site) as other:
        list(until(other, "tokens"))
        result = build(recipe, site, progress=seen.append)
        assert other.wait(120) == 0
    assert [progress.stage for progress in seen if progress.stage in ("waiting", "tokens")] == ["waiting"]
    datasets = Path(site.open_storage().path("datasets"))
    assert sorted(path.name for path in datasets.iterdir()) == sorted([Path(result.card.store).name, "by-recipe"])
    assert find(recipe, site) == result.card
