"""Weights from a seed: transformers' own rules, all parameters set, and the same model however it is sliced."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from outgrow.errors import ModelError
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.initialise import SeededWeights, draw, module_seed
from outgrow.trainers.models.tiny import tiny_config
from outgrow.trainers.regions import Region


def whole(source: SeededWeights, name: str) -> torch.Tensor:
    shape = source.shape(name)
    return source.read(name, Region.whole(shape))


def born_by_transformers(config: PretrainedConfig, seed: int) -> dict[str, torch.Tensor]:
    """What ``from_config`` makes, each module then drawn again, in transformers' order, from the seed of its name."""
    model = AutoModelForCausalLM.from_config(config)

    def visit(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)
        torch.manual_seed(module_seed(seed, name))
        model._init_weights(module)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        visit(model, "")
        # A tied head stands after the embedding and would be drawn once more.
        if config.tie_word_embeddings:
            torch.manual_seed(module_seed(seed, "model.embed_tokens"))
            model._init_weights(model.model.embed_tokens)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers_rules(family: str) -> None:
    config = tiny_config(family)
    expected = born_by_transformers(config, seed=7)
    source = SeededWeights(config, seed=7)
    assert set(source.names()) == set(expected)
    for name, values in expected.items():
        assert torch.equal(whole(source, name), values), name


@pytest.mark.parametrize("family", FAMILIES)
def test_spread_is_that_of_from_config(family: str) -> None:
    config = tiny_config(family)
    torch.manual_seed(0)
    plain = {name: p.detach() for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    source = SeededWeights(config, seed=0)
    for name, parameter in plain.items():
        values = whole(source, name)
        if parameter.dim() == 1:
            assert torch.equal(values, parameter), name
        else:
            assert abs(float(values.std()) - float(parameter.std())) < 0.3 * float(parameter.std()), name
            assert abs(float(values.mean())) < 0.3 * float(parameter.std()), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_of_any_number_of_ranks_make_the_same_model(ranks: int) -> None:
    config = tiny_config("qwen3")
    reference = SeededWeights(config, seed=1)
    for rank in range(ranks):
        source = SeededWeights(config, seed=1)
        for name in reversed(list(source.names())):
            shape = source.shape(name)
            rows = -(-shape[0] // ranks)
            start, stop = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
            region = Region((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))
            assert torch.equal(source.read(name, region), whole(reference, name)[region.slices]), name


def test_names_and_seeds_decide_the_values() -> None:
    config = tiny_config("llama")
    source = SeededWeights(config, seed=1)
    first, second = (whole(source, f"model.layers.{i}.self_attn.q_proj.weight").clone() for i in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, whole(SeededWeights(config, seed=2), "model.layers.0.self_attn.q_proj.weight"))
    assert torch.equal(first, whole(source, "model.layers.0.self_attn.q_proj.weight"))


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    whole(SeededWeights(tiny_config("llama"), seed=1), "lm_head.weight")
    assert torch.equal(torch.rand(3), expected)


def test_a_parameter_that_no_rule_sets_is_refused_by_name() -> None:
    model = meta_model(tiny_config("llama"), "fp32")
    model.model.register_parameter("temperature", nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(ModelError, match=r"llama: no rule of initialisation sets model\.temperature"):
        draw(model, "model", seed=0)
