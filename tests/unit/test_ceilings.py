"""What a model costs in arithmetic, against counts by hand, and what a device can do."""

from __future__ import annotations

import pytest
import torch

from outgrow.trainers.ceilings import Arithmetic, arithmetic_of, measured_flops, vendor_flops
from outgrow.trainers.models.build import meta_model

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KEYS = 1000, 32, 56, 2, 4, 2


def arithmetic(kind: str, **keys: object) -> Arithmetic:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        **keys,
    )
    return arithmetic_of(meta_model(config, "fp32"))


def attention_parameters(head_dim: int) -> int:
    return LAYERS * HIDDEN * head_dim * (2 * HEADS + 2 * KEYS)


NORMS = (2 * LAYERS + 1) * HIDDEN
MLP = 3 * HIDDEN * INNER


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_meets_every_parameter_but_an_embedding_that_is_only_looked_up(tied: bool) -> None:
    found = arithmetic("llama", tie_word_embeddings=tied)
    body = attention_parameters(HIDDEN // HEADS) + LAYERS * MLP + NORMS
    assert found.parameters == body + VOCAB * HIDDEN * (1 if tied else 2)
    assert found.used == body + VOCAB * HIDDEN
    assert found.flops_per_token(64) == 6 * found.used + 12 * LAYERS * HIDDEN * 64


def test_heads_may_be_wider_than_the_model() -> None:
    found = arithmetic("qwen3", head_dim=24, tie_word_embeddings=True)
    assert found.attention == LAYERS * HEADS * 24


def test_of_a_mixture_the_experts_that_are_chosen_count() -> None:
    found = arithmetic("mixtral", num_local_experts=6, num_experts_per_tok=2, tie_word_embeddings=False)
    assert found.parameters - found.used == LAYERS * 4 * MLP + VOCAB * HIDDEN


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        ("NVIDIA B200", 2250),
        ("AMD EPYC", None),
    ],
)
def test_what_vendors_say(name: str, tera: float | None) -> None:
    assert vendor_flops(name, "bf16") == (None if tera is None else tera * 1e12)
    assert vendor_flops(name, "fp32") is None


def test_measuring_draws_nothing_and_takes_some_tenths_of_a_second() -> None:
    before = torch.get_rng_state()
    assert 1e8 < measured_flops(torch.device("cpu"), "fp32") < 1e14
    assert torch.equal(before, torch.get_rng_state())
