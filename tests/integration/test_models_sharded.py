"""Every tested family sharded over two processes: FSDP2 must compute what one process computes, experts or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn

from outgrow.trainers.models.experts import mixtures
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.models.probes import filled
from outgrow.trainers.models.sharded_probe import LENGTH, TOKENS, measure, measure_on_two_ranks
from outgrow.trainers.models.tiny import tiny_config


def test_two_ranks_have_the_loss_and_gradient_norm_of_one(tmp_path: Path) -> None:
    configs = {family: tiny_config(family) for family in FAMILIES}
    found = measure_on_two_ranks(configs, tmp_path)
    assert set(found) == set(FAMILIES)
    for family, config in configs.items():
        expected = measure(config, world=1, rank=0)
        assert found[family] == pytest.approx(expected, rel=1e-9), family


def test_the_two_ranks_of_that_step_choose_different_experts() -> None:
    chosen = [_experts_chosen(token) for token in TOKENS]
    assert any(first - second and second - first for first, second in zip(*chosen, strict=True))


def _experts_chosen(token: int) -> list[set[int]]:
    """For each layer the experts that one rank's row goes to."""
    config = tiny_config("mixtral")
    model = filled(config, SeededWeights(config, 0), "fp64")
    chosen: list[set[int]] = []
    for module in mixtures(model):
        gate = module.gate
        assert isinstance(gate, nn.Module)
        gate.register_forward_hook(lambda *call: chosen.append(set(call[2].topk(2, dim=-1).indices.flatten().tolist())))
    with torch.no_grad():
        model(input_ids=torch.full((1, LENGTH), token), use_cache=False)
    return chosen
