"""Folders of weights: which of their files are copied, and where the weights of a name are read from."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets_of_cards import card, index_card
from kept_folders import WEIGHTS, Kept, copied_digests, flip, make_site, write_weights

from outgrow.errors import DataError
from outgrow.recipes.placed import claim_key, record_key, weight_files, weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.storage import tree_digests
from outgrow.trainers.bring_up import first_weights
from outgrow.trainers.models.build import config_for, meta_model
from outgrow.trainers.models.probes import lively
from outgrow.trainers.models.tiny import tiny_config
from outgrow.trainers.regions import Region

STREAM = {"name": "text", "source": {"kind": "text", "path": "text"}}
RECIPE = {
    "schema": 1,
    "run": {"name": "test", "seed": 0},
    "model": {"kind": "folder", "path": "llama"},
    "batch": {"rows": 2},
    "duration": {"steps": 1},
    "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
}


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    write_weights(tmp_path / "models/llama")
    (tmp_path / "storage").mkdir()
    return make_site(tmp_path)


def test_pickles_hidden_files_and_folders_are_left_out_by_name(kept: Kept) -> None:
    model = kept.root / "models/llama"
    for name in ("pytorch_model.bin", "optimizer.pt", ".gitattributes"):
        (model / name).write_bytes(b"x")
    (model / "onnx").mkdir()
    kept.apply([(WEIGHTS, "fast")])
    assert sorted(set(os.listdir(model)) - set(os.listdir(kept.folder("fast", WEIGHTS)))) == [
        ".gitattributes",
        "onnx",
        "optimizer.pt",
        "pytorch_model.bin",
    ]
    assert f"{WEIGHTS}: not copied, as nothing reads them: .gitattributes, onnx, optimizer.pt, pytorch_model.bin" in (
        kept.stock().notes
    )


def test_a_snapshot_of_a_hub_cache_is_copied_with_its_blobs(tmp_path: Path) -> None:
    write_weights(tmp_path / "plain")
    hub = tmp_path / "hub/models--x--llama"
    snapshot = hub / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for name, sha256 in tree_digests(tmp_path / "plain").items():
        shutil.copyfile(tmp_path / "plain" / name, hub / "blobs" / sha256)
        (snapshot / name).symlink_to(f"../../blobs/{sha256}")
    (tmp_path / "storage").mkdir()
    kept = make_site(tmp_path, sources={"llama": str(snapshot)})
    assert [outcome.result for outcome in kept.apply([(WEIGHTS, "fast")])] == ["copied"]
    assert copied_digests(kept.folder("fast", WEIGHTS)) == tree_digests(tmp_path / "plain")
    assert not any(path.is_symlink() for path in kept.folder("fast", WEIGHTS).iterdir())
    blob = next(path for path in (hub / "blobs").iterdir() if path.stat().st_size > 1000)
    flip(blob)  # its name is its digest
    assert [outcome.result for outcome in kept.apply([(WEIGHTS, "slow")])] == ["copied"]  # the other blob is whole on fast
    kept.remove(WEIGHTS, "slow")
    shutil.rmtree(kept.folder("fast", WEIGHTS))
    assert [outcome.result for outcome in kept.apply([(WEIGHTS, "slow")])] == ["damaged"]


@pytest.mark.parametrize("leads_to", ["../../secret", "/etc/passwd", "missing", "../blobs/x"])
def test_links_that_lead_out_of_the_folder_are_refused_by_name(tmp_path: Path, leads_to: str) -> None:
    write_weights(tmp_path / "models/llama")
    for path in (tmp_path / "secret", tmp_path / "models/blobs/x"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("s")
    (tmp_path / "models/llama/merges.txt").symlink_to(leads_to)
    with pytest.raises(DataError, match="not a plain file of this folder: 'merges.txt'"):
        weight_files(tmp_path / "models/llama")
    (tmp_path / "storage").mkdir()
    assert "merges.txt" in make_site(tmp_path).item(WEIGHTS).holdings[0].problem


def test_weights_that_lack_a_file_of_their_index_are_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "m")
    (tmp_path / "m/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match="names files that are not there: model-00002-of-00002.safetensors"):
        weight_files(tmp_path / "m")


def test_weights_are_read_from_the_fastest_whole_copy(kept: Kept) -> None:
    original = kept.root / "models/llama"
    assert weights_folder(kept.site, "llama") == original
    kept.apply([(WEIGHTS, "slow")])
    assert weights_folder(kept.site, "llama") == original  # on no tier, so before the second
    kept.apply([(WEIGHTS, "fast")])
    assert weights_folder(kept.site, "llama") == kept.folder("fast", WEIGHTS)
    shutil.move(original, kept.root / "unplugged")
    assert weights_folder(kept.site, "llama") == kept.folder("fast", WEIGHTS)
    (kept.folder("fast", WEIGHTS) / "config.json").write_text("{ }")
    assert weights_folder(kept.site, "llama") == kept.folder("slow", WEIGHTS)


@pytest.mark.parametrize("change", ["written again", "added", "another folder", "being repaired"])
def test_a_copy_that_is_not_of_the_folder_as_it_is_now_is_not_read(kept: Kept, change: str) -> None:
    kept.apply([(WEIGHTS, "fast")])
    site, original = kept.site, kept.root / "models/llama"
    if change == "written again":
        write_weights(original, 9)  # of the same sizes
    elif change == "added":
        (original / "generation_config.json").write_text("{}")
    elif change == "another folder":
        write_weights(kept.root / "models/other", 9)
        original = kept.root / "models/other"
        site = make_site(kept.root, sources={"llama": str(original)}).site
    else:
        shutil.copyfile(kept.folder("fast", record_key(WEIGHTS)), kept.folder("fast", claim_key(WEIGHTS)))
    assert weights_folder(site, "llama") == original


def test_a_run_takes_configuration_and_weights_from_the_copy(tmp_path: Path) -> None:
    """Without the original, which shows where they come from; the model is the same, bit for bit."""
    model = lively(tiny_config("llama"))
    model.save_pretrained(tmp_path / "models/llama")
    (tmp_path / "storage").mkdir()
    kept = make_site(tmp_path)
    data = {"tokenizer": {"kind": "train", "vocab_size": 300}, "streams": [STREAM], "sequence_length": 16}
    recipe = Recipe.model_validate(RECIPE | {"data": data})
    kept.apply([(WEIGHTS, "fast")])
    shutil.move(tmp_path / "models/llama", tmp_path / "unplugged")
    vocabulary = dataclasses.replace(
        card(index_card(16, {"text": (1, 1)})), vocab_size=model.config.vocab_size, eos_token_id=model.config.eos_token_id
    )
    config = config_for(recipe, kept.site, vocabulary)
    weights = first_weights(recipe, kept.site, config, meta_model(config, recipe.precision))
    for name, values in model.named_parameters():
        assert torch.equal(weights.read(name, Region.whole(values.shape)), values)


def test_an_original_on_a_faster_tier_is_read_rather_than_a_copy(tmp_path: Path) -> None:
    write_weights(tmp_path / "slow/weights/llama")
    kept = make_site(tmp_path, sources={"llama": str(tmp_path / "slow/weights/llama")})
    (tmp_path / "storage").mkdir()
    assert kept.state(WEIGHTS, "slow") == "original"
    kept.apply([(WEIGHTS, "fast")])
    assert weights_folder(kept.site, "llama") == kept.folder("fast", WEIGHTS)
    kept.remove(WEIGHTS, "fast")
    assert weights_folder(kept.site, "llama") == kept.folder("slow", WEIGHTS)
