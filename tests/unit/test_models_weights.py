"""A Hugging Face folder as a source of tensors: what is whole is read exactly, what is not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from outgrow.errors import IntegrityError, ModelError
from outgrow.storage import tree_digests
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.grown import GrownWeights
from outgrow.trainers.models.probes import filled, lively
from outgrow.trainers.models.tiny import tiny_config
from outgrow.trainers.models.weights import FolderWeights, row_parts
from outgrow.trainers.regions import Region


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    lively(tiny_config("llama")).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    """Rewrite the one file of weights: ``name=None`` takes a tensor away, ``name=tensor`` sets it (``__`` for dots)."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_save_pretrained_comes_back_bit_equal(family: str, shard: str, tmp_path: Path) -> None:
    model = lively(tiny_config(family))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    source = FolderWeights(tmp_path)
    source.check(meta_model(tiny_config(family), "fp32"))
    for name, parameter in filled(tiny_config(family), source).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_any_box_is_the_slice_of_the_whole(llama: Path) -> None:
    source = FolderWeights(llama)
    name = "model.layers.1.mlp.down_proj.weight"
    whole = load_file(llama / "model.safetensors")[name]
    for offset, shape in (((0, 0), (32, 48)), ((3, 5), (7, 11)), ((31, 47), (1, 1)), ((0, 8), (32, 40))):
        region = Region(offset, shape)
        assert torch.equal(source.read(name, region), whole[region.slices])
    assert torch.equal(
        source.read("model.norm.weight", Region((4,), (5,))), load_file(llama / "model.safetensors")["model.norm.weight"][4:9]
    )


def test_every_missing_extra_and_misshapen_tensor_is_named_at_once(llama: Path) -> None:
    change(
        llama,
        model__norm__weight=None,
        lm_head__weight=torch.zeros(95, 32),
        model__layers__9__mlp__up_proj__weight=torch.zeros(2),
        model__layers__0__self_attn__q_proj__weight=torch.zeros(32, 32, dtype=torch.int8),
    )
    with pytest.raises(ModelError) as raised:
        FolderWeights(llama).check(meta_model(tiny_config("llama"), "fp32"))
    message = str(raised.value)
    assert str(llama) in message
    assert "missing: model.norm.weight [32]" in message
    assert "extra: model.layers.9.mlp.up_proj.weight [2]" in message
    assert "misshapen: lm_head.weight is [95, 32], the model's is [96, 32]" in message
    assert "not of floats: model.layers.0.self_attn.q_proj.weight is I8" in message


def test_rotary_frequencies_of_older_files_are_no_extra(llama: Path) -> None:
    change(llama, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    FolderWeights(llama).check(meta_model(tiny_config("llama"), "fp32"))


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path) -> None:
    config = tiny_config("gemma2")
    model = lively(config)
    model.save_pretrained(tmp_path)
    embedding = model.get_parameter("model.embed_tokens.weight").detach()
    change(tmp_path, lm_head__weight=embedding.clone())
    FolderWeights(tmp_path).check(meta_model(config, "fp32"))
    change(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(ModelError, match=r"not tied: lm_head\.weight differs from model\.embed_tokens\.weight"):
        FolderWeights(tmp_path).check(meta_model(config, "fp32"))


@pytest.mark.parametrize("damage", [b"", b"\x00" * 4, b"\xff" * 64, b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": [1, 2], x}'])
def test_a_broken_header_is_a_plain_message(llama: Path, damage: bytes) -> None:
    (llama / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        FolderWeights(llama)


def test_a_truncated_file_is_refused(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        FolderWeights(llama)


def test_pickles_are_refused_by_name(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights in pickle files \(pytorch_model\.bin\), which can run code"):
        FolderWeights(llama)


def test_an_empty_folder_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights here"):
        FolderWeights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../evil.safetensors"}}, "is not the name of a safetensors file in this folder"),
        ({"weight_map": {"a": "/etc/evil.safetensors"}}, "is not the name of a safetensors file in this folder"),
        ({"weight_map": {"a": "weights.bin"}}, "is not the name of a safetensors file in this folder"),
        ({"weight_map": {"a": 3}}, "is not the name of a safetensors file in this folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"a": "real.safetensors", "b": "real.safetensors"}}, "names tensors that its files lack: b"),
        ({"weights": {}}, "not an index of safetensors"),
        ([], "not an index of safetensors"),
    ],
)
def test_a_wrong_index_is_refused(index: Any, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "real.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        FolderWeights(tmp_path)


def test_an_exported_folder_is_verified_before_its_bytes_are_used(llama: Path) -> None:
    manifest = {"run": "r", "step": 1, "checkpoint_digest": "", "dtype": "fp32", "parameters": 1, "files": tree_digests(llama)}
    (llama / "outgrow-export.json").write_text(json.dumps(manifest))
    region = Region((0,), (32,))
    FolderWeights(llama).read("model.norm.weight", region)
    data = bytearray((llama / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (llama / "model.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="differ from their digest"):
        FolderWeights(llama).read("model.norm.weight", region)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (7, 3), (5, 2, 2), (3, 100)])
def test_row_parts_cover_a_tensor_once_and_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    parts = [whole[part.slices].reshape(-1) for part in row_parts(shape, elements=6)]
    assert torch.equal(torch.cat(parts), whole.reshape(-1))
    assert all(part.numel() <= max(6, Region((), shape[1:]).numel) for part in parts)


# --- a larger vocabulary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_new_tokens_begin_as_the_mean_of_those_that_are_there(family: str, tmp_path: Path) -> None:
    """Embedding and head, tied in one of the families; whatever box of them a rank asks for."""
    lively(tiny_config(family)).save_pretrained(tmp_path)
    config = tiny_config(family)
    old, config.vocab_size = config.vocab_size, config.vocab_size + 3
    model = meta_model(config, "fp32")
    source = GrownWeights(tmp_path, model)
    source.check(model)
    folder = FolderWeights(tmp_path)
    grown = filled(config, source)
    for name, parameter in grown.named_parameters():
        given = folder.read(name, Region.whole(folder.shape(name)))
        if parameter.shape == given.shape:
            assert torch.equal(parameter, given), name
            continue
        assert name in ("model.embed_tokens.weight", "lm_head.weight")
        expected = torch.cat([given, given.double().mean(dim=0).float().expand(3, -1)])
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)
        for first, rows in ((0, old), (old - 1, 2), (old, 1), (old + 1, 2), (5, old - 2)):
            part = source.read(name, Region((first, 3), (rows, 7)))
            assert torch.equal(part, parameter[first : first + rows, 3:10])
    with pytest.raises(ModelError, match=r"misshapen: model\.embed_tokens\.weight"):
        folder.check(model)


def test_known_tokens_score_as_before_when_the_vocabulary_grows(llama: Path) -> None:
    config = tiny_config("llama")
    before = filled(config, FolderWeights(llama))
    config.vocab_size += 2
    after = filled(config, GrownWeights(llama, meta_model(config, "fp32")))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        old, new = before(input_ids=ids).logits, after(input_ids=ids).logits
    torch.testing.assert_close(new[..., :-2], old, rtol=0, atol=1e-5)
    torch.testing.assert_close(new[..., -1], old.mean(dim=-1), rtol=0, atol=1e-3)


def test_a_vocabulary_that_did_not_grow_is_the_folders(llama: Path) -> None:
    model = meta_model(tiny_config("llama"), "fp32")
    source, folder = GrownWeights(llama, model), FolderWeights(llama)
    source.check(model)
    for name in folder.names():
        whole = Region.whole(folder.shape(name))
        assert source.shape(name) == folder.shape(name)
        assert torch.equal(source.read(name, whole), folder.read(name, whole))
