"""``outgrow plan`` on a real recipe: it forecasts without building, and says every reason at once why a run could not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from outgrow.cli import main

RECIPE = """
schema: 1
run: {name: small, seed: 1}
model:
  kind: architecture
  family: llama
  config: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}
data:
  sequence_length: 64
  tokenizer: {kind: train, vocab_size: 400}
  streams: [{name: a, source: {kind: text, path: texts}}]
batch: {rows: 4}
duration: {steps: 12}
optimizer: {learning_rate: 0.001}
precision: fp32
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("once upon a time\n" * 100)
    (tmp_path / "site.yaml").write_text("schema: 1\nstorage: store\ncache: cache\ncluster: {address: local}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def outgrow(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_a_run_that_can_start(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outgrow("plan", recipe) == 0
    text = capsys.readouterr().out
    assert "length  12 steps, 3,072 tokens\n" in text
    assert "note    the dataset is not built yet" in text
    assert text.endswith("this run can start\n")
    assert not (tmp_path / "store").exists()


def test_a_run_that_cannot_start(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outgrow("plan", recipe, "--workers", "5000") == 2
    refusals = capsys.readouterr().out.partition("this run cannot start\n")[2]
    assert "  - 5000 rank(s) of 1 CPU(s); available: " in refusals
    assert "  - batch.rows is 4, too few for 5000 ranks; allowed: at most one rank a row\n" in refusals


def test_machines_that_are_not_here(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--gpus", "2", "--gpu-memory", "80 GB", "--nodes", "2", "--ram", "1 TB"]
    assert outgrow("plan", recipe, *there) == 0
    text = capsys.readouterr().out
    assert text.startswith("a forecast for 2 node(s) of 2 x 80.0 GB, 1.0 TB of memory; nothing can be started from here\n")
    assert "ranks   4 on cuda" in text and "on the device of a rank: " in text
    assert text.endswith("this run could start there\n")
    offload = "parallel={kind: zero, offload_optimizer: nvme}"
    assert outgrow("plan", recipe, *there, offload) == 2
    assert "no tier is declared" in capsys.readouterr().out
    assert outgrow("plan", recipe, *there, "--disk", "1 TB", offload) == 0
    assert "on a node's first tier (its cache folder where the site has no tiers): offload" in capsys.readouterr().out
    assert outgrow("plan", recipe, *there, "--disk", "10.5 MB", offload) == 2
    assert "beside 1.0 MB on the first tier, which is the same disk; available: 10.5 MB" in capsys.readouterr().out
    assert outgrow("plan", recipe, "--gpus", "1", "--gpu-memory", "1 MB", "--ram", "1 TB") == 2
    refused = capsys.readouterr().out.partition("this run cannot start\n")[2]
    assert "on a GPU (" in refused and "available: 1.0 MB on each" in refused
    assert outgrow("plan", recipe, "--gpus", "2") == 2
    assert "--gpus, --gpu-memory and --ram together" in capsys.readouterr().err
