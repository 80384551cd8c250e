"""Every expert has a gradient, chosen or not; outputs and the gradients of the chosen ones stay as they were."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Case
from tiny_models import FAMILIES

from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.experts import mixtures
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.models.probes import filled
from outgrow.trainers.models.shapes import shapes_of
from outgrow.trainers.models.tiny import tiny_config

ROW = torch.full((1, 8), 3)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_every_expert_has_a_gradient_and_nothing_else_changes(gradient_checkpointing: bool) -> None:
    config = tiny_config("mixtral")
    hooked, bare = (filled(config, SeededWeights(config, 0)) for _ in range(2))
    for module in mixtures(bare):
        module._forward_hooks.clear()
    if gradient_checkpointing:
        hooked.gradient_checkpointing_enable({"use_reentrant": False})
    outputs = [model(input_ids=ROW, use_cache=False).logits for model in (hooked, bare)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    unused = 0
    for (name, with_hook), without in zip(hooked.named_parameters(), bare.parameters(), strict=True):
        assert with_hook.grad is not None, name
        if without.grad is None:
            unused += 1
            assert with_hook.grad.count_nonzero() == 0, name
        else:
            assert torch.equal(with_hook.grad, without.grad), name
    assert unused >= 3, "the row chose every expert, so nothing was shown"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"])
@pytest.mark.parametrize("chosen", [2, 4])
def test_planning_knows_of_every_mixture(family: str, chosen: int) -> None:
    config = tiny_config(family)
    config.num_experts_per_tok, config.first_k_dense_replace = chosen, 1
    for name in {"num_local_experts", "num_experts", "n_routed_experts"} & set(vars(config)):
        setattr(config, name, 4)
    found = shapes_of(meta_model(config, "fp32"), Case().recipe())
    assert found["has_mixtures"]
    assert found["expert_share"] == chosen / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_only_mixtures_are_hooked(family: str) -> None:
    model = meta_model(tiny_config(family), "fp32")
    assert len(mixtures(model)) == (model.config.num_hidden_layers if family == "mixtral" else 0)
    assert shapes_of(model, Case().recipe())["has_mixtures"] == (family == "mixtral")
