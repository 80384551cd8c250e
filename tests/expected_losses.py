"""What a case of ``engine_cases`` must come to, by the oracles: losses and gradient norms of every step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import oracle
import oracle_lora
import pytest
import torch
from engine_cases import STEPS, Case, Outcome, born_model, born_weights, rows_of_steps, train

from outgrow.recipes.schema.adapter import Lora
from outgrow.trainers.adapters.sources import A, AdaptedWeights, adapted_module
from outgrow.trainers.adapters.targets import matches
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.regions import Region
from outgrow.trainers.schedule import learning_rate

Losses = tuple[list[float], list[float]]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 5e-3}
"""Measured between layouts: fp64 2e-15, fp32 5e-7, bf16 3e-4 in losses of 4.1 to 4.6 and 1e-3 in norms of 1."""
FLOAT32_INSIDE = 1e-6
"""Gemma 2 computes norms and softmax in float32 whatever the model's type: 1e-8 in losses, 1e-7 in norms were measured."""
QLORA = 1e-4
"""Numbers are unpacked from 4 bits to float32 at most, whose products then differ by their shapes; 1e-6 was measured."""


def expected(case: Case) -> Losses:
    """What the oracle comes to, one document at a time: worked out once for all engines and ranks."""
    return _expected(case.family, case.precision, json.dumps(case.adapter))


@cache
def _expected(family: str, precision: str, adapter: str) -> Losses:
    steps = [[document for documents in rows for document in documents] for rows in rows_of_steps()]
    return by_oracle(Case(family=family, precision=precision, adapter=json.loads(adapter)), steps)


def on_one(case: Case) -> Outcome:
    """What the engine without wrapping comes to with the same model, method and precision: worked out once."""
    return _on_one(case.family, case.precision, json.dumps(case.adapter), case.base)


@cache
def _on_one(family: str, precision: str, adapter: str, base: str) -> Outcome:
    return train(Case(family=family, precision=precision, adapter=json.loads(adapter), base=base))


def tolerance_of(case: Case) -> float:
    """How far a case may be from the oracle at any of its steps, in loss and gradient norm."""
    four_bits = QLORA if case.adapter.get("base") == "nf4" else 0.0
    return max(TOLERANCE[case.precision], FLOAT32_INSIDE if case.family == "gemma2" else 0.0, four_bits)


def by_oracle(case: Case, steps: Sequence[Any]) -> Losses:
    """Losses and gradient norms of ``steps``, each a list of documents."""
    adapter = Lora.model_validate(case.adapter) if case.adapter else None
    config, weights = case.config(), born_weights(case)
    recipe = case.recipe()
    optimizer = recipe.optimizer
    if case.family == "gemma2":
        config._attn_implementation = "eager"  # sdpa leaves the soft cap out
    settings: dict[str, Any] = dict(
        rates=[learning_rate(recipe, step, STEPS) for step in range(len(steps))],
        dtype=DTYPES[case.precision],
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
    )
    if adapter is None:
        losses, norms, _ = oracle.train(config, weights, steps, **settings)
        return losses, norms
    matrices = drawn_matrices(case)
    if adapter.base == "nf4":
        weights = weights | {f"{name}.weight": through_nf4(weights[f"{name}.weight"]) for name in matrices}
    losses, norms, _ = oracle_lora.train(
        config,
        weights,
        matrices,
        steps,
        scale=adapter.alpha / (adapter.rank**0.5 if adapter.scaling == "rslora" else adapter.rank),
        dora=adapter.dora,
        whole=[name for name, _ in born_model(case).named_modules() if any(matches(p, name) for p in adapter.fully_trained)],
        **settings,
    )
    return losses, norms


def drawn_matrices(case: Case) -> Mapping[str, torch.Tensor]:
    """The ``A`` that each adapted layer begins with: the one thing that the oracle cannot know by itself."""
    plain = Case(family=case.family, precision=case.precision, adapter={**case.adapter, "base": "full"})
    source = AdaptedWeights(SeededWeights(case.config(), plain.recipe().run.seed), plain.recipe(), born_model(plain))
    names = [name for name in source.names() if name.endswith(A)]
    return {adapted_module(name): source.read(name, Region((0, 0), source.shape(name))) for name in names}


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that 4 bits make of ``weight``, by bitsandbytes' own functions."""
    import bitsandbytes as bnb

    # As one row: of rows that are no whole number of blocks, a CPU with AVX-512 makes numbers by the scales of others.
    packed, state = bnb.functional.quantize_4bit(
        weight.reshape(1, -1), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    numbers: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return numbers.view_as(weight)


def close(found: Outcome, losses: Sequence[float], norms: Sequence[float], tolerance: float) -> None:
    """Fails where a step is off; prints by how much the worst is (pytest -rP), for the table in docs/engines.md."""
    pairs = [*zip(found.losses, losses, strict=True), *zip(found.norms, norms, strict=True)]
    print(f"apart by {max(abs(mine - theirs) for mine, theirs in pairs):.1e}, allowed {tolerance:.0e}")
    assert found.losses == pytest.approx(losses, rel=0, abs=tolerance)
    assert found.norms == pytest.approx(norms, rel=0, abs=tolerance)
