"""A build that is killed: no dataset is visible, its processes end, and the next one starts clean and gives the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from text_recipes import make_recipe, make_site, text, text_stream

from outgrow.errors import DataError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import tree_digests
from outgrow.streaming.build import build, find
from outgrow.streaming.store import Progress

_SCRIPT = """
import json, sys
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming import build as builder
from outgrow.streaming.build import build
from outgrow.streaming.sources import text

builder.UNIT_BYTES = text.UNIT_BYTES = 20_000  # many units from little text

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


def until(process: subprocess.Popen[str], stage: str) -> Iterator[str]:
    """The lines of the process up to the first that says ``stage``."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()
        if line.strip() == stage:
            return
    raise AssertionError(f"the build ended before {stage}")


def wait_for_end(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


def test_kill_9_of_a_build_leaves_nothing_and_the_next_one_starts_clean(tmp_path: Path, work: tuple[Recipe, Path]) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=2, prose=folder)
    with started(tmp_path, recipe, site) as process:
        list(until(process, "tokens"))
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
    datasets = Path(site.open_storage().path("datasets"))
    (aside,) = datasets.iterdir()
    assert aside.name.startswith(".building-")
    assert find(recipe, site) is None
    wait_for_end(children, 30)

    result = build(recipe, site)
    assert result.built
    assert sorted(path.name for path in datasets.iterdir()) == sorted([Path(result.card.store).name, "by-recipe"])
    untouched = make_site(tmp_path / "untouched", prose=folder)
    reference = build(recipe, untouched)
    assert reference.card == result.card
    assert tree_digests(Path(untouched.open_storage().path(result.card.store))) == tree_digests(
        datasets.parent / result.card.store
    )


def test_kill_9_of_one_of_its_processes_ends_the_build_with_a_reason(
    tmp_path: Path, work: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = work
    monkeypatch.setattr("outgrow.streaming.build.UNIT_BYTES", 20_000)
    monkeypatch.setattr("outgrow.streaming.sources.text.UNIT_BYTES", 20_000)
    site = make_site(tmp_path, build_processes=2, prose=folder)

    def kill_a_process(progress: Progress) -> None:
        if progress.stage == "tokens":
            for child in multiprocessing.active_children()[:1]:
                child.kill()

    with pytest.raises(DataError, match="a process of the build was killed"):
        build(recipe, site, progress=kill_a_process)
    assert list(Path(site.open_storage().path("datasets")).iterdir()) == []


def test_two_builds_at_once_give_one_dataset(tmp_path: Path, work: tuple[Recipe, Path]) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=1, prose=folder)
    with started(tmp_path, recipe, site) as other:
        list(until(other, "tokenizer"))
        result = build(recipe, site)
        assert other.wait(120) == 0
    datasets = Path(site.open_storage().path("datasets"))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and len(list(datasets.iterdir())) > 2:
        time.sleep(0.1)
    assert sorted(path.name for path in datasets.iterdir()) == sorted([Path(result.card.store).name, "by-recipe"])
    assert find(recipe, site) == result.card
