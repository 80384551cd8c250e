"""What a submitted job is given: enough to run, and nothing that should stay here."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from outgrow.cluster.submit import pack, site_to_send
from outgrow.recipes.loading import load
from outgrow.recipes.site_loading import bind, load_site

RECIPE = """
schema: 1
run: {name: sent, seed: 1}
model: {kind: architecture, family: llama}
data:
  sequence_length: 64
  tokenizer: {kind: train, vocab_size: 300}
  streams:
    - {name: mine, source: {kind: text, path: texts}}
    - {name: library, source: {kind: text, path: python-stdlib}}
batch: {rows: 4}
duration: {steps: 10}
optimizer: {learning_rate: 0.001}
"""

SITE = """
schema: 1
storage: s3://${env:BUCKET}/outgrow
storage_options: {key: "${env:STORE_KEY}", secret: "${env:STORE_SECRET}"}
cache: here/cache
sources: {other: data/other}
cluster: {dashboard: http://head:8265, token_file: secret-place/token}
threads_per_worker: 2
"""


def test_the_site_means_the_same_elsewhere_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BUCKET", "b"), ("STORE_KEY", "PUBLICKEY"), ("STORE_SECRET", "HUSH")):
        monkeypatch.setenv(name, value)
    (tmp_path / "texts").mkdir()
    recipe_path, site_path = tmp_path / "recipe.yaml", tmp_path / "site.yaml"
    recipe_path.write_text(RECIPE)
    site_path.write_text(SITE)
    site = bind(load_site(site_path), load(recipe_path), recipe_path)

    sent = site_to_send(yaml.safe_load(SITE), site)

    assert sent == {
        "schema": 1,
        "storage": "s3://${env:BUCKET}/outgrow",
        "storage_options": {"key": "${env:STORE_KEY}", "secret": "${env:STORE_SECRET}"},
        "cache": str(tmp_path / "here" / "cache"),
        "sources": {"other": str(tmp_path / "data" / "other"), "texts": str(tmp_path / "texts")},
        "threads_per_worker": 2,
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.yaml").write_text(RECIPE)
    (elsewhere / "site.yaml").write_text(yaml.safe_dump(sent))
    there = bind(load_site(elsewhere / "site.yaml"), load(elsewhere / "recipe.yaml"), elsewhere / "recipe.yaml")
    assert (there.storage, there.cache, there.sources) == (site.storage, site.cache, site.sources)


def test_without_a_site_file_the_node_uses_its_own_defaults(tmp_path: Path) -> None:
    assert site_to_send({}, load_site(None)) == {"schema": 1}


def test_a_parcel_holds_recipe_site_and_package_alone(tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / ".env").write_text("HUSH")
    (tmp_path / "parcel").mkdir()

    parcel = pack(tmp_path / "parcel", recipe=recipe, site={"schema": 1}, overrides=["run.name=a b"], flags=["--fresh"])

    assert sorted(path.name for path in parcel.working_folder.rglob("*")) == ["recipe.yaml", "site.yaml"]
    assert shlex.split(parcel.entrypoint) == [
        *("python", "-m", "outgrow", "train", "recipe.yaml", "run.name=a b", "--site", "site.yaml", "--fresh")
    ]
    sent = {path.relative_to(parcel.package).as_posix() for path in parcel.package.rglob("*")}
    assert {"errors.py", "cluster/submit.py", "recipes/presets/quickstart.yaml", "py.typed"} <= sent
    assert not [name for name in sent if "__pycache__" in name]
    assert not [path for path in parcel.package.rglob("*") if path.is_symlink()]


def test_the_sent_package_works_on_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "parcel").mkdir()
    parcel = pack(tmp_path / "parcel", recipe=recipe, site={}, overrides=[], flags=[])
    code = (
        "import pathlib, outgrow.recipes.loading as l; print(l.__file__); print(l.load(pathlib.Path('recipe.yaml')).run.name)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=parcel.working_folder,
        env={"PYTHONPATH": str(parcel.package.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [str(parcel.package / "recipes" / "loading.py"), "sent"]
