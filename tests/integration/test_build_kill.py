"""A build that is killed: no dataset is visible, its processes end, and the next build starts clean and gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from text_recipes import make_recipe, make_site, text, text_stream

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import tree_digests
from outgrow.streaming.build import build, find

_SCRIPT = """
import json, sys
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.build import build

if __name__ == "__main__":
    recipe, site = json.load(open(sys.argv[1]))
    build(Recipe.model_validate(recipe), Site.model_validate(site), progress=lambda p: print(p.stage, flush=True))
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and the folder of its 5 MB of text: some seconds of work for two processes."""
    root = tmp_path_factory.mktemp("kill")
    folder = root / "prose"
    folder.mkdir()
    paragraph = text(1, 2000)
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


def test_kill_9_of_one_of_its_processes_ends_the_build_with_a_reason(tmp_path: Path, work: tuple[Recipe, Path]) -> None:
    recipe, folder = work
    site = make_site(tmp_path, build_processes=2, prose=folder)
    (tmp_path / "build.py").write_text(_SCRIPT)
    with started(tmp_path, recipe, site) as process:
        list(until(process, "tokens"))
        workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        os.kill(workers[0].pid, signal.SIGKILL)
        assert process.wait(60) == 1
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
