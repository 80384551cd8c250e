"""A run of a model of the user's own, as any other: on one rank and sharded over two, halted and resumed, exported and read."""

from __future__ import annotations

import json
from pathlib import Path

import custom_gpt
import pytest
import torch
from safetensors.torch import load_file
from token_stores import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training_jobs import TRAIN_WORKER, curve, job, records, two_streams

from outgrow.cluster.local import run_local
from outgrow.contracts import JobSpec
from outgrow.errors import ModelError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import list_checkpoints
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.export import export
from outgrow.trainers.models.build import config_for
from outgrow.trainers.regions import Region

STEPS = 9
MODEL = {"kind": "custom", "factory": "custom_gpt:gpt", "options": {"width": 32, "layers": 3}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return two_streams(tmp_path_factory.mktemp("dataset"))


def run(dataset: Dataset, name: str, steps: int = STEPS, **recipe: object) -> JobSpec:
    spec = job(dataset, name, steps, **{"model": MODEL, "precision": "fp64", **recipe})
    run_local(spec, TRAIN_WORKER, on_record=lambda record: None)
    return spec


@pytest.fixture(scope="module")
def straight(dataset: Dataset) -> JobSpec:
    return run(dataset, "straight")


def test_halted_and_resumed_on_two_ranks_it_learns_the_same(dataset: Dataset, straight: JobSpec) -> None:
    run(dataset, "halted", 5)
    run(dataset, "halted", workers=2)
    wanted = curve(dataset, "straight")
    for step, figures in curve(dataset, "halted").items():
        assert figures == pytest.approx(wanted[step], rel=1e-9)
    losses = [loss for loss, _ in wanted.values()]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    last, other = (records(dataset, name, "validation")[-1].loss for name in ("straight", "halted"))
    assert last == pytest.approx(other, rel=1e-9)


def test_an_export_is_read_by_the_factorys_module(straight: JobSpec, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer/tokenizer.json"))
    storage = Storage(str(dataset.root))
    reader = open_checkpoint(storage, list_checkpoints(storage, straight.run.folder)[0])
    config = config_for(Recipe.model_validate(straight.recipe), Site.model_validate(straight.site), straight.card)
    out = tmp_path / "out"
    export(reader, config, tmp_path / "tokenizer", out, dtype="fp32", run="straight", step=STEPS, checkpoint_digest="")
    made = json.loads((out / "model.json").read_text())
    assert made.pop("vocab_size") == straight.card.vocab_size and made == MODEL
    assert not (out / "config.json").exists()
    model = custom_gpt.gpt(vocab_size=straight.card.vocab_size, **MODEL["options"])
    weights = load_file(out / "model.safetensors")
    assert model.load_state_dict(weights, strict=False).missing_keys == ["head.weight"], "which is tied"
    name = "blocks.2.down.weight"
    trained = reader.read(f"model/module.{name}", Region((0, 0), tuple(weights[name].shape)))
    assert torch.equal(dict(model.named_parameters())[name], trained.float())


def test_one_that_leaks_is_refused_before_the_first_step(dataset: Dataset) -> None:
    faulty = {**MODEL, "options": {**MODEL["options"], "faults": ["leaks"]}}
    with pytest.raises(ModelError, match="lets a document see another one"):
        run(dataset, "leaks", model=faulty)
    assert not records(dataset, "leaks", "step")
