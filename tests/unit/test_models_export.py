"""Exported folders: complete, digested, loadable by transformers with the same scores, and good for generating text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from outgrow.contracts import ExportManifest
from outgrow.errors import IntegrityError, ModelError, PlanError
from outgrow.storage import tree_digests
from outgrow.trainers import export as export_module
from outgrow.trainers.export import export, plan_shards
from outgrow.trainers.generate import choose, generate, load, sample
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.families import attention_implementation
from outgrow.trainers.models.probes import HeldTensors, filled, lively
from outgrow.trainers.models.tiny import VOCABULARY, tiny_config
from outgrow.trainers.models.weights import FolderWeights

CPU = torch.device("cpu")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """96 tokens: letters as bytes, so that one character may take several."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3], *"Ð±"]
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(dict.fromkeys(alphabet))}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )
    return folder


def source(config: PretrainedConfig) -> HeldTensors:
    """What a checkpoint holds of a model, optimizer states beside it."""
    tensors = {f"model/{name}": parameter.detach() for name, parameter in lively(config).named_parameters()}
    return HeldTensors({**tensors, "optim/model.norm.weight/step": torch.tensor(3.0)})


def exported(family: str, tokenizer: Path, *, dtype: export_module.ExportDtype = "fp32", shard_bytes: int = 10**9) -> Path:
    out = tokenizer.parent / "exports" / family
    config = tiny_config(family)
    export(source(config), config, tokenizer, out, dtype=dtype, run="r", step=5, checkpoint_digest="d", shard_bytes=shard_bytes)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_in_transformers_with_the_trainers_scores(family: str, tokenizer: Path) -> None:
    out = exported(family, tokenizer, shard_bytes=30_000)
    config = tiny_config(family)
    loaded = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation=attention_implementation(config), dtype=torch.float32
    )
    assert loaded.config.use_cache
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = lively(config).train(False)(input_ids=ids, use_cache=False).logits
        assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, expected)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 0
    assert GenerationConfig.from_pretrained(out).eos_token_id == 0


def test_the_manifest_has_the_digest_of_every_file(tokenizer: Path) -> None:
    out = exported("llama", tokenizer, shard_bytes=30_000)
    manifest = ExportManifest.from_dict(json.loads((out / "outgrow-export.json").read_bytes()))
    assert (manifest.run, manifest.step, manifest.checkpoint_digest, manifest.dtype) == ("r", 5, "d", "fp32")
    assert manifest.parameters == sum(p.numel() for p in lively(tiny_config("llama")).parameters())
    assert manifest.files == tree_digests(out, leave_out=["outgrow-export.json"])
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= manifest.files.keys()
    assert sorted(os.listdir(out.parent)) == ["llama"]


def test_one_shard_needs_no_index_and_bf16_is_half_the_size(tokenizer: Path) -> None:
    out = exported("llama", tokenizer, dtype="bf16")
    assert [name for name in WEIGHTS if (out / name).exists()] == ["model.safetensors"]
    config = json.loads((out / "config.json").read_bytes())
    assert (config["dtype"], config["architectures"], config["model_type"]) == ("bfloat16", ["LlamaForCausalLM"], "llama")
    assert str(tokenizer.parent) not in json.dumps(config)
    back = filled(tiny_config("llama"), FolderWeights(out))
    for name, parameter in lively(tiny_config("llama")).named_parameters():
        assert torch.equal(back.get_parameter(name), parameter.bfloat16().float()), name


def test_the_same_export_again_is_verified_and_left_alone(tokenizer: Path) -> None:
    out = exported("llama", tokenizer)
    before = (out / "model.safetensors").stat()
    assert exported("llama", tokenizer) == out
    assert (out / "model.safetensors").stat() == before
    with pytest.raises(ModelError, match="there is something else here already"):
        exported("llama", tokenizer, dtype="bf16")
    (out / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        exported("llama", tokenizer)


def test_a_failed_export_leaves_nothing(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json here"):
        exported("llama", tokenizer)
    assert list((tokenizer.parent / "exports").iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tokenizer: Path) -> None:
    config = tiny_config("llama")
    config.num_hidden_layers, config.intermediate_size = 4, 64
    with pytest.raises(ModelError) as raised:
        export(
            source(tiny_config("llama")),
            config,
            tokenizer,
            tokenizer.parent / "out",
            dtype="fp32",
            run="",
            step=0,
            checkpoint_digest="",
        )
    assert "missing: model.layers.3.self_attn.q_proj.weight" in str(raised.value)
    assert "misshapen: model.layers.0.mlp.up_proj.weight is [48, 32], the model's is [64, 32]" in str(raised.value)


def test_a_disk_without_room_is_refused_before_anything_is_written(tokenizer: Path) -> None:
    rows = 2**46
    config = tiny_config("llama")
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(config, "fp32").named_parameters()}
    config.vocab_size = rows

    class Endless(HeldTensors):
        def shape(self, name: str) -> tuple[int, ...]:
            shape = shapes[name.removeprefix("model/")]
            return (rows, *shape[1:]) if shape[0] == VOCABULARY else shape

    endless = Endless({f"model/{name}": torch.empty(0) for name in shapes})
    with pytest.raises(PlanError, match="GB free"):
        export(endless, config, tokenizer, tokenizer.parent / "out", dtype="fp32", run="", step=0, checkpoint_digest="")
    assert not (tokenizer.parent / "out").exists()


def test_shards_hold_all_names_in_order_within_the_limit() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 1}
    assert plan_shards(sizes, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(sizes, 100) == [list(sizes)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_with_the_cache_are_those_without(family: str, tokenizer: Path) -> None:
    model, _ = load(exported(family, tokenizer), CPU)
    given = list(range(1, 12))
    made = list(sample(model, given, 20, temperature=0.0, top_p=1.0, generator=torch.Generator()))
    twin = list(given)
    with torch.no_grad():
        while len(twin) < len(given) + 20:
            token = int(model(input_ids=torch.tensor([twin]), use_cache=False).logits[0, -1].argmax())
            if token == 0:
                break
            twin.append(token)
    assert made == twin[len(given) :]
    assert made


def test_one_seed_gives_one_text_and_pieces_join_to_what_the_tokenizer_says(tokenizer: Path) -> None:
    out = exported("llama", tokenizer)

    def text(seed: int) -> list[str]:
        return list(generate(out, "#$%", max_new_tokens=30, temperature=1.0, top_p=0.9, seed=seed, device=CPU))

    assert text(1) == text(1)
    assert text(1) != text(2)
    model, words = load(out, CPU)
    ids = words.encode("#$%")
    made = list(sample(model, ids, 30, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(1)))
    assert "#$%" + "".join(text(1)) == words.decode([*ids, *made])


def test_the_nucleus_is_the_likeliest_tokens_that_reach_top_p() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        assert {choose(logits, temperature=1.0, top_p=top_p, generator=generator) for _ in range(300)} == kept
    draws = [choose(logits, temperature=1.0, top_p=1.0, generator=generator) for _ in range(4000)]
    assert [draws.count(token) / 4000 for token in range(4)] == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=0.03)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("#", {"max_new_tokens": 64}, "the prompt has 1 tokens and 64 are asked for, but the model has 64 positions"),
        ("#", {"temperature": -1.0}, "temperature must be 0 or more"),
        ("#", {"top_p": 0.0}, "top_p above 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt: str, options: dict[str, float], message: str, tokenizer: Path) -> None:
    out = exported("llama", tokenizer)
    asked = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0, **options}
    with pytest.raises(ModelError, match=message):
        list(generate(out, prompt, device=CPU, **asked))  # type: ignore[arg-type]


def test_a_flipped_byte_in_an_export_is_never_generated_from(tokenizer: Path) -> None:
    out = exported("llama", tokenizer)
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        generate(out, "#", max_new_tokens=1, temperature=0, top_p=1, seed=0, device=CPU)
