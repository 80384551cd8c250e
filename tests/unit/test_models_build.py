"""Configurations: what a recipe may say of a model, and the message for what it may not; models without memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets_of_cards import card, index_card
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

from outgrow.errors import ModelError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.render.named_templates import TEMPLATES
from outgrow.streaming.render.templates import needed_tokens
from outgrow.trainers.models.build import blocks, config_for, facts, meta_model
from outgrow.trainers.models.checked import checked, remember
from outgrow.trainers.models.families import embedding_and_head
from outgrow.trainers.models.probes import lively
from outgrow.trainers.models.tiny import tiny_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CARD = dataclasses.replace(card(index_card(16, {"text": (1, 1)})), vocab_size=300, eos_token_id=7)


def recipe(model: dict[str, Any], *, sequence_length: int = 16, tokenizer: dict[str, Any] | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "test", "seed": 0},
            "model": model,
            "data": {
                "sequence_length": sequence_length,
                "tokenizer": tokenizer or {"kind": "train", "vocab_size": 280},
                "streams": [{"name": "text", "source": {"kind": "text", "path": "text"}}],
            },
            "batch": {"rows": 2},
            "duration": {"steps": 1},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        }
    )


def llama(**keys: Any) -> dict[str, Any]:
    return {"kind": "architecture", "family": "llama", "config": {**SIZES, **keys}}


def mixtral(**keys: Any) -> dict[str, Any]:
    return {"kind": "architecture", "family": "mixtral", "config": {**SIZES, **keys}}


def test_vocabulary_and_end_of_text_come_from_the_dataset() -> None:
    config = config_for(recipe(llama()), Site(), CARD)
    assert (config.vocab_size, config.eos_token_id) == (300, 7)
    assert (config.bos_token_id, config.pad_token_id, config.use_cache) == (None, None, False)


def test_before_the_data_are_built_the_vocabulary_is_the_one_asked_for(tmp_path: Path) -> None:
    assert config_for(recipe(llama()), Site()).vocab_size == 280
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5, "content": "<END>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    folder = {"kind": "folder", "path": "words"}
    site = Site(sources={"words": str(tmp_path)})
    assert config_for(recipe(llama(), tokenizer=folder), site).vocab_size == 6
    for tag, size in (("<YAML>", 7), ("<END>", 6)):
        data = recipe(llama(), tokenizer=folder).to_dict()
        data["data"]["streams"][0]["tag"] = tag
        assert config_for(Recipe.model_validate(data), site).vocab_size == size


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (llama(hiden_size=64), "model.config: hiden_size: llama has no such key; did you mean hidden_size?"),
        (llama(colour="red"), "model.config: colour: llama has no such key"),
        (llama(eos_token_id=3), "eos_token_id: remove it; it comes from the dataset or the trainer"),
        (llama(use_cache=True), "use_cache: remove it"),
        (llama(hidden_size="large"), "hidden_size: 'large' is not like the default, 4096"),
        (llama(hidden_size=32.5), "hidden_size: 32.5 is not like the default, 4096"),
        (llama(hidden_size=0), "model.config: hidden_size is 0; it must be a whole number from 1"),
        (llama(tie_word_embeddings=1), "tie_word_embeddings: 1 is not like the default, False"),
        (llama(num_key_value_heads="two"), "num_key_value_heads"),
        (llama(num_attention_heads=5, num_key_value_heads=5), "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (llama(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (llama(head_dim=7), "a head has 7 dimensions; rotary positions need an even number"),
        (llama(attention_dropout=0.1), "attention_dropout is 0.1; only 0.0 is supported"),
        (llama(hidden_act="gelu_newest"), "model.config: hidden_act 'gelu_newest' is unknown\n  did you mean gelu_new?"),
        (
            mixtral(output_router_logits=True),
            "output_router_logits is True; only False is supported: the router's auxiliary loss",
        ),
        (mixtral(router_jitter_noise=0.1), "router_jitter_noise is 0.1; only 0.0 is supported"),
        (mixtral(num_local_experts=2, num_experts_per_tok=3), "num_experts_per_tok 3 is more than num_local_experts 2"),
        ({"kind": "architecture", "family": "lama"}, "transformers knows no family 'lama' that predicts next tokens"),
        ({"kind": "architecture", "family": "clip"}, "transformers knows no family 'clip'"),
    ],
)
def test_a_mistake_in_the_configuration_has_its_message(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as raised:
        config_for(recipe(model), Site(), CARD)
    assert message in str(raised.value)


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ModelError, match=r"hiden_size(.|\n)*layers"):
        config_for(recipe(llama(hiden_size=64, layers=3)), Site(), CARD)


def test_rows_longer_than_the_models_positions_are_refused() -> None:
    with pytest.raises(ModelError, match="data.sequence_length is 65, but the model has 64 positions"):
        config_for(recipe(llama(), sequence_length=65), Site(), CARD)


def test_a_stage_with_rows_longer_than_the_models_positions_is_refused() -> None:
    data = recipe(llama()).to_dict()
    data["data"]["stages"] = [{"tokens": 9, "shares": {"text": 1}}, {"shares": {"text": 1}, "sequence_length": 65}]
    with pytest.raises(ModelError) as caught:
        config_for(Recipe.model_validate(data), Site(), CARD)
    assert caught.value.message == "data.stages[1].sequence_length is 65, but the model has 64 positions"
    assert caught.value.hint == "lower data.stages[1].sequence_length to 64, or raise max_position_embeddings"


class TestFolder:
    """A model that goes on from weights."""

    model = {"kind": "folder", "path": "base"}

    @pytest.fixture
    def site(self, tmp_path: Path) -> Site:
        lively(tiny_config("qwen3")).save_pretrained(tmp_path)
        return Site(sources={"base": str(tmp_path)})

    def edit(self, site: Site, **keys: Any) -> None:
        path = Path(site.sources["base"]) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **keys}))

    def test_the_configuration_is_the_folders(self, site: Site) -> None:
        dataset = dataclasses.replace(CARD, vocab_size=90, eos_token_id=0)
        config = config_for(recipe(self.model), site, dataset)
        assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("qwen3", 96, 3)
        assert config.layer_types == tiny_config("qwen3").layer_types

    def test_a_tokenizer_with_more_tokens_is_not_the_models(self, site: Site) -> None:
        with pytest.raises(ModelError, match="tokenizer has 300 tokens, the model 96: the tokenizer is not the model's"):
            config_for(recipe(self.model), site, CARD)

    def test_tokens_that_the_recipe_adds_make_the_vocabulary_larger(self, site: Site) -> None:
        data = recipe(self.model).to_dict()
        data["data"]["streams"][0]["tag"] = "<YAML>"
        tagged = Recipe.model_validate(data)
        dataset = dataclasses.replace(CARD, vocab_size=97, eos_token_id=0)
        assert config_for(tagged, site, dataset).vocab_size == 97
        with pytest.raises(ModelError, match="tokenizer has 98 tokens, the model 96: the tokenizer is not the model's"):
            config_for(tagged, site, dataclasses.replace(dataset, vocab_size=98))

    @pytest.mark.parametrize(
        "template", [*({"kind": "named", "name": name} for name in TEMPLATES), {"kind": "file", "path": "own.jinja"}]
    )
    def test_a_template_may_add_as_many_tokens_as_any_that_is_known(self, site: Site, template: dict[str, str]) -> None:
        most = max(len(needed_tokens(text)) for text in TEMPLATES.values())
        data = recipe(self.model).to_dict()
        data["data"]["streams"][0]["chat"]["template"] = template
        dataset = dataclasses.replace(CARD, vocab_size=96 + most, eos_token_id=0)
        assert config_for(Recipe.model_validate(data), site, dataset).vocab_size == 96 + most

    def test_another_end_of_text_is_not_the_models(self, site: Site) -> None:
        dataset = dataclasses.replace(CARD, vocab_size=96)
        with pytest.raises(ModelError, match="end with token 7, those of the model with 0"):
            config_for(recipe(self.model), site, dataset)

    def test_values_that_cannot_be_honoured_name_the_file(self, site: Site) -> None:
        self.edit(site, attention_dropout=0.5, quantization_config={"quant_method": "gptq"})
        with pytest.raises(ModelError, match=r"config\.json: attention_dropout is 0\.5(.|\n)*quantised weights"):
            config_for(recipe(self.model), site, dataclasses.replace(CARD, vocab_size=96, eos_token_id=0))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not a configuration that transformers can read"),
            ("[]", "not a configuration that transformers can read"),
            ('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}', "transformers knows no family 'evil'"),
            ("{}", "not a configuration that transformers can read"),
        ],
    )
    def test_a_broken_configuration_is_refused(self, site: Site, content: str, message: str) -> None:
        (Path(site.sources["base"]) / "config.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            config_for(recipe(self.model), site)

    def test_a_folder_without_configuration_is_refused(self, tmp_path: Path) -> None:
        site = Site(sources={"base": str(tmp_path / "base")})
        with pytest.raises(ModelError, match="there is no such folder"):
            config_for(recipe(self.model), site)
        (tmp_path / "base").mkdir()
        with pytest.raises(ModelError, match=r"no config\.json here"):
            config_for(recipe(self.model), site)
        (tmp_path / "base/adapter_config.json").touch()
        with pytest.raises(ModelError, match=r"this is an adapter alone\n  outgrow export RUN FOLDER --merged"):
            config_for(recipe(self.model), site)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_model_has_no_parameter_memory_and_right_buffers(family: str) -> None:
    config = tiny_config(family)
    model = meta_model(config, "fp64")
    real = AutoModelForCausalLM.from_config(config)
    assert model.training
    assert len(blocks(model)) == config.num_hidden_layers
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in real.named_parameters()]
    for (name, buffer), (real_name, real_buffer) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        assert name == real_name
        assert torch.equal(buffer, real_buffer), name
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (family == "gemma2")


def test_embedding_and_head_are_known_where_they_share_nothing_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta_model(tiny_config("llama"), "fp32")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding_and_head(model) == (embedding, head)
    head.bias = model.bias = torch.nn.Parameter(torch.empty(head.out_features, device="meta"))
    assert embedding_and_head(model) == (None, None), "as heads of BERT's kind have it"
    assert embedding_and_head(meta_model(tiny_config("gemma2"), "fp32")) == (None, None), "tied"
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert embedding_and_head(model) == (None, None)


def test_what_transformers_cannot_build_is_refused_by_the_plan() -> None:
    with pytest.raises(ModelError, match="transformers cannot build this llama: 'magic'"):
        facts(recipe(llama(rope_scaling={"rope_type": "magic", "factor": 2.0})), Site())


def test_state_beside_the_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaModel.__init__

    def with_state(self: Any, config: Any) -> None:
        plain(self, config)
        self.register_buffer("count", torch.zeros(1))

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", with_state)
    with pytest.raises(ModelError, match=r"state that is no parameter, which is not supported: model\.count"):
        meta_model(tiny_config("llama"), "fp32")


def test_facts_count_a_large_model_without_allocating_it() -> None:
    model = {
        "kind": "architecture",
        "family": "llama",
        "config": {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    }
    dataset = dataclasses.replace(CARD, vocab_size=128256)
    found = facts(recipe(model), Site(), dataset)
    assert found.parameters == 70_553_706_496  # Llama 3 70B
    assert (found.family, found.blocks, found.hidden_size, found.vocab_size) == ("llama", 80, 8192, 128256)
    assert (found.largest_tensor, found.max_positions, found.tied_embeddings) == (128256 * 8192, 2048, False)


def test_an_unchecked_family_is_refused_until_it_is_remembered(tmp_path: Path) -> None:
    model = {"kind": "architecture", "family": "qwen2", "config": SIZES}
    site = Site(cache=str(tmp_path))
    with pytest.raises(ModelError, match=r"qwen2 has not been checked(.|\n)*run: outgrow model check qwen2"):
        facts(recipe(model), site)
    remember("qwen2", tmp_path)
    remember("phi3", tmp_path)
    assert checked(tmp_path) == ["phi3", "qwen2"]
    assert facts(recipe(model), site).family == "qwen2"


def test_a_pass_with_other_versions_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "checked-models.json").write_text(json.dumps({"transformers 4.0.0, torch 1.0": ["qwen2"]}))
    assert checked(tmp_path) == []
