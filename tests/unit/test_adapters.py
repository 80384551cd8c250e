"""Adapters in a model on meta: what they touch, what they begin as, what is kept of them, and which base they belong to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Case, born_engine, born_model, rows_of_steps, trained_steps
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from torch import nn

from outgrow.errors import ModelError
from outgrow.recipes.schema.adapter import Lora
from outgrow.storage import file_digest
from outgrow.trainers.adapters.identity import BaseIdentity, folder_identity, require_same_base
from outgrow.trainers.adapters.merge import MergedWeights
from outgrow.trainers.adapters.sources import AdaptedWeights
from outgrow.trainers.adapters.targets import choose, matches
from outgrow.trainers.bring_up import first_weights
from outgrow.trainers.ceilings import arithmetic_of
from outgrow.trainers.engines.materialise import materialise
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.models.probes import HeldTensors, lively
from outgrow.trainers.models.tiny import tiny_config
from outgrow.trainers.regions import Region, fill

RANK = 3


def case(precision: str = "fp64", family: str = "llama", **adapter: Any) -> Case:
    return Case(precision=precision, family=family, adapter={"kind": "lora", "rank": RANK, "alpha": 5.0, **adapter})


def source(chosen: Case) -> AdaptedWeights:
    weights = first_weights(chosen.recipe(), chosen.site(), chosen.config(), born_model(chosen))
    assert isinstance(weights, AdaptedWeights)
    return weights


def lora(**keys: Any) -> Lora:
    return Lora(kind="lora", **keys)


def whole(weights: Any, name: str) -> torch.Tensor:
    shape = weights.shape(name)
    return weights.read(name, Region.whole(shape))


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("mlp.*", "model.layers.0.mlp.up_proj", True),
        ("model.layers.1?.mlp.*", "model.layers.12.mlp.up_proj", True),
        ("model.layers.1?.mlp.*", "model.layers.1.mlp.up_proj", False),
        ("*norm", "model.layers.0.input_layernorm", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("Q_proj", "model.layers.0.self_attn.q_proj", False),
    ],
)
def test_a_pattern_is_of_the_full_name_or_its_last_parts(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) == fits


def test_all_linear_layers_of_the_blocks_and_neither_head_nor_embedding() -> None:
    model = meta_model(tiny_config("llama"), "fp32")
    chosen = choose(model, lora())
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert list(chosen.adapted) == blocks == list(chosen.linear)
    assert choose(model, lora(fully_trained=("mlp",))).adapted == tuple(name for name in blocks if "mlp" not in name)


@pytest.mark.parametrize(
    ("adapter", "message", "hint"),
    [
        ({"targets": ("q_porj",)}, r"no linear layer is called 'q_porj'; there are: model\.layers\.\*\.", "q_proj"),
        ({"targets": ("embed_tokens",)}, "no linear layer is called 'embed_tokens'", ""),
        ({"fully_trained": ("nrom",)}, r"no module is called 'nrom'; there are: model, model\.embed_tokens, ", "norm"),
        ({"targets": ("mlp.*",), "fully_trained": ("model.layers.0",)}, "chosen by targets and by fully_trained", "narrower"),
        ({"fully_trained": ("layers",)}, "all-linear finds no layer", "adapter: none"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_refused_with_what_there_is(adapter: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        choose(meta_model(tiny_config("llama"), "fp32"), lora(**adapter))
    assert hint in raised.value.hint


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    config = tiny_config("gemma2")
    assert config.tie_word_embeddings
    with pytest.raises(ModelError, match=r"lm_head shares its weights with model\.embed_tokens") as raised:
        choose(meta_model(config, "fp32"), lora(targets=("lm_head",)))
    assert "fully_trained: [lm_head]" in raised.value.hint


def trained_parameters(model: nn.Module, adapter: Lora) -> int:
    """Counted by hand: what is trained of ``model``, which is as it was built."""
    chosen = choose(model, adapter)
    whole = {id(p): p.numel() for name in chosen.whole for p in model.get_submodule(name).parameters()}
    count = sum(whole.values())
    for name in chosen.adapted:
        out_features, in_features = model.get_submodule(name).weight.shape  # type: ignore[misc]
        count += adapter.rank * (in_features + out_features) + (out_features if adapter.dora else 0)
    return count


# --- the adapted model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_allocated_or_drawn_and_frozen_weights_are_in_the_dtype_that_computes(family: str) -> None:
    chosen = dataclasses.replace(case("bf16", dora=True, fully_trained=["*norm", "embed_tokens"]), family="llama")
    recipe = chosen.recipe()
    model = meta_model(tiny_config(family), "bf16")
    plain = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    count, tied = trained_parameters(model, recipe.adapter), model.config.tie_word_embeddings
    state = torch.get_rng_state()
    from outgrow.trainers.adapters.lora import adapt

    adapt(model, recipe)
    assert torch.equal(state, torch.get_rng_state())
    parameters = dict(model.named_parameters())
    assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {parameters[name].dtype for name in trained} == {torch.float32}
    assert {parameters[name].dtype for name in parameters.keys() - trained} == {torch.bfloat16}
    assert all(".lora_" in name or "norm" in name or "embed_tokens" in name for name in trained)
    assert sum(parameters[name].numel() for name in trained) == count
    base = {name.replace(".base_layer", ""): p for name, p in parameters.items() if ".lora_" not in name}
    assert {name: tuple(p.shape) for name, p in base.items()} == plain
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("adapter", [{}, {"scaling": "rslora"}, {"dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_a_model_begins_as_its_base(adapter: dict[str, Any]) -> None:
    adapted, plain = born_engine(case(**adapter)), born_engine(Case())
    ids = torch.arange(20)[None]
    inputs = (ids, torch.zeros_like(ids), ids)
    assert torch.allclose(adapted.logits(*inputs), plain.logits(*inputs), rtol=0, atol=1e-6 if adapter.get("dora") else 0)


def test_first_weights_are_those_of_the_seed_and_the_name_in_any_parts() -> None:
    weights = source(case("fp32", dora=True))
    name = "model.layers.1.mlp.down_proj"
    a, b, lengths = (whole(weights, f"{name}.{part}.default.weight") for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
    assert a.shape == (RANK, 56) and b.shape == (32, RANK) and lengths.shape == (32,)
    assert not b.any()
    assert a.abs().max() <= 56**-0.5 and a.std().item() == pytest.approx((56 * 3) ** -0.5, rel=0.2)
    base = whole(SeededWeights(Case().config(), weights._seed), f"{name}.weight")
    assert torch.allclose(lengths, base.norm(dim=1), rtol=1e-6)
    again = source(case("fp32", dora=True))
    whole(again, "model.layers.0.mlp.up_proj.lora_A.default.weight")  # another order changes nothing
    box = Region((1, 10), (2, 7))
    assert torch.equal(again.read(f"{name}.lora_A.default.weight", box), a[box.slices])
    assert torch.equal(again.read(f"{name}.lora_magnitude_vector.default.weight", Region((5,), (9,))), lengths[5:14])
    other = whole(weights, "model.layers.0.mlp.down_proj.lora_A.default.weight")
    assert not torch.equal(a, other)


def test_lengths_of_dora_are_of_the_rows_as_the_model_computes_with_them() -> None:
    weights = source(case("bf16", dora=True))
    name = "model.layers.1.mlp.down_proj"
    rows = whole(weights.base, f"{name}.weight").bfloat16().float()
    assert torch.equal(whole(weights, f"{name}.lora_magnitude_vector.default.weight"), torch.linalg.vector_norm(rows, dim=1))


def test_a_checkpoint_holds_what_is_trained_and_no_more() -> None:
    engine = born_engine(case("fp32", fully_trained=["model.norm"]))
    held = engine.tensors()
    count = trained_parameters(meta_model(Case().config(), "fp32"), case(fully_trained=["model.norm"]).recipe().adapter)
    models = {name: tensor for name, tensor in held.items() if name.startswith("model/")}
    assert sum(tensor.numel() for tensor in models.values()) == count
    assert all(".lora_" in name or name == "model/model.norm.weight" for name in models)
    assert sum(tensor.numel() for tensor in held.values()) == 3 * count + len(models)  # two moments and a step counter each


def test_adapters_of_experts_that_no_token_chose_have_a_gradient_of_zero_and_frozen_experts_none() -> None:
    chosen = case(family="mixtral")
    model, weights = born_model(chosen), source(chosen)
    materialise(model, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        fill(parameter, name, weights)
    model(input_ids=torch.tensor([[5]]), use_cache=False).logits.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name.split(".experts.")[1][0] for name in with_gradient if ".layers.0." in name and ".experts." in name
             and model.get_parameter(name).grad.any()}  # fmt: skip
    assert len(moved) == 2, "two of four experts are chosen"


# --- the adapter worked in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [{}, {"scaling": "rslora"}, {"dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_the_merged_model_computes_what_the_adapted_one_does(adapter: dict[str, Any]) -> None:
    chosen = case(**adapter, fully_trained=["model.norm"])
    engine = born_engine(chosen)
    list(trained_steps(engine, chosen, 0, rows_of_steps()[:6]))
    names = [name for name, _ in meta_model(chosen.config(), "fp64").named_parameters()]
    base, settings = SeededWeights(chosen.config(), chosen.recipe().run.seed), chosen.recipe().adapter
    assert isinstance(settings, Lora)
    merged = MergedWeights(HeldTensors(engine.tensors()), base, settings, names)
    plain = born_engine(Case())
    plain.load_model(merged, "model/")
    ids = torch.arange(20)[None]
    inputs = (ids, torch.zeros_like(ids), ids)
    difference = (plain.logits(*inputs) - engine.logits(*inputs)).abs().max().item()
    assert difference < 1e-6  # logits come as float32
    assert (plain.logits(*inputs) - born_engine(Case()).logits(*inputs)).abs().max().item() > 0.02
    name = "model/model.layers.0.mlp.down_proj.weight"
    box = Region((3, 5), (7, 11))
    assert torch.allclose(merged.read(name, box), whole(merged, name)[box.slices], rtol=1e-12)


# --- which base -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    model = lively(tiny_config("llama"))
    model.save_pretrained(folder)
    return folder


def test_a_copy_is_the_same_base_and_another_training_of_it_is_not(base: Path, tmp_path: Path) -> None:
    identity = folder_identity(base)
    shutil.copytree(base, tmp_path / "copy")
    assert folder_identity(tmp_path / "copy") == identity == BaseIdentity.from_dict(json.loads(json.dumps(identity.to_dict())))
    weights = load_file(base / "model.safetensors")
    save_file({name: values * 1.001 for name, values in weights.items()}, base / "model.safetensors")
    other = folder_identity(base)
    assert other.files["config.json"] == identity.files["config.json"] and other != identity
    with pytest.raises(ModelError) as raised:
        require_same_base(identity.to_dict(), other, "runs/r/checkpoints/step-00000004")
    text = str(raised.value)
    assert identity.digest[:16] in text and other.digest[:16] in text and "different: model.safetensors" in text
    require_same_base(other.to_dict(), other, "here")
    require_same_base(None, None, "here")


def test_a_large_file_is_read_in_parts_that_reach_its_ends(base: Path) -> None:
    path = base / "model.safetensors"
    values = torch.arange(2_000_000, dtype=torch.float32)
    found = set()
    for place in (None, 0, 1_999_999):
        changed = values.clone()
        if place is not None:
            changed[place] += 0.5
        save_file({"a": changed}, path)
        found.add(folder_identity(base).digest)
    save_file({"b": values}, path)
    found.add(folder_identity(base).digest)
    assert len(found) == 4


def test_of_an_export_the_manifest_says_which_base_it_is(base: Path) -> None:
    names = ("config.json", "model.safetensors")
    manifest = {
        "run": "r",
        "step": 1,
        "checkpoint_digest": "",
        "dtype": "fp32",
        "parameters": 1,
        "files": {name: file_digest(base / name) for name in names},
    }
    (base / "outgrow-export.json").write_text(json.dumps(manifest))
    assert folder_identity(base).files == manifest["files"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_frozen_weight_has_no_gradient_of_its_own() -> None:
    full = arithmetic_of(meta_model(Case().config(), "fp32"))
    found = arithmetic_of(born_model(case("fp32")))
    added = found.parameters - full.parameters
    assert found.trained == added == trained_parameters(meta_model(Case().config(), "fp32"), case().recipe().adapter)
    expected = 4 * full.used + 6 * added + 12 * full.attention * 64
    assert found.flops_per_token(64) == expected


def test_blocks_before_the_first_adapter_are_passed_forward_alone() -> None:
    full = arithmetic_of(meta_model(Case().config(), "fp32"))
    found = arithmetic_of(born_model(case("fp32", targets=["model.layers.1.self_attn.q_proj"])))
    block = sum(p.numel() for name, p in meta_model(Case().config(), "fp32").named_parameters() if ".layers.0." in name)
    added = RANK * 64
    expected = 2 * (full.used + added) + 2 * (full.used + added - block) + 2 * added + (4 + 4) * full.attention * 64
    assert found.flops_per_token(64) == expected
