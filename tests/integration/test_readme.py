"""The README's commands, as they stand there, on a small stand-in for the preset and a few files of Python's library."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PRESET = Path("recipes/presets/quickstart.yaml")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def shrink(recipe: dict[str, object]) -> dict[str, object]:
    """The preset with a model and a dataset that take seconds."""
    small = yaml.safe_load(yaml.safe_dump(recipe))
    small["model"]["config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["data"]["sequence_length"] = 64
    small["data"]["tokenizer"]["vocab_size"] = 512
    small["data"]["validation_fraction"] = 0.2
    small["duration"] = {"steps": 4}
    small["schedule"]["warmup_steps"] = 1
    return small


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the small recipe under the preset's name, and a site of its own in the user's config folder."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in ("json", "email", "wsgiref"):
        shutil.copytree(library / package, tmp_path / "library" / package, ignore=shutil.ignore_patterns("__pycache__"))
    preset = tmp_path / "work" / PRESET
    preset.parent.mkdir(parents=True)
    preset.write_text(yaml.safe_dump(shrink(yaml.safe_load((ROOT / PRESET).read_text()))))
    config = tmp_path / "config" / "outgrow"
    config.mkdir(parents=True)
    site = {
        "schema": 1,
        "storage": str(tmp_path / "storage"),
        "cache": str(tmp_path / "cache"),
        "monitoring": {"agent": False, "folder": str(tmp_path / "monitoring")},
        "sources": {"python-stdlib": str(tmp_path / "library")},
    }
    (config / "site.yaml").write_text(yaml.safe_dump(site))
    return tmp_path / "work"


def run(words: list[str], workplace: Path) -> str:
    environment = os.environ | {"XDG_CONFIG_HOME": str(workplace.parent / "config"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=workplace, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [words[1] for words in commands() if words[0] == "make"]
    named += re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text())
    assert named
    assert set(named) <= set(targets)


@pytest.mark.timeout(600)
@pytest.mark.cluster
def test_commands_of_the_readme_run_in_their_order(workplace: Path) -> None:
    said = {}
    for words in commands():
        if words[0] == "outgrow" and words[1:3] != ["site", "init"]:
            said[" ".join(words[1:3])] = run(words, workplace)
    assert "quickstart" in said["runs list"]
    assert "finished" in said["runs list"]
    assert "def main():" in said["generate exported"]
    again = run(["outgrow", "train", str(PRESET), "--workers", "2"], workplace)
    assert "nothing to do" in again


@pytest.mark.timeout(300)
@pytest.mark.cluster
def test_quickstart_sums_up(workplace: Path) -> None:
    out = run(["outgrow", "quickstart", str(PRESET)], workplace)
    assert re.search(r"unigram +\d\.\d{3} +\d\.\d{3}", out)
    assert re.search(r"model +\d\.\d{3} +\d\.\d{3}", out)
