"""The switches of speed and the other optimizers on two ranks: what FSDP2 computes with them is what one rank computes."""

from __future__ import annotations

from typing import Any

import pytest
from engine_cases import Case, Outcome, on_ranks, train

CHUNKED = {"cross_entropy": {"kind": "chunked", "tokens": 20}}
SETTINGS: dict[str, dict[str, Any]] = {
    "chunked": CHUNKED,
    "chunked, Gemma 2": CHUNKED,
    "chunked, LoRA": CHUNKED | {"adapter": {"kind": "lora", "rank": 4, "targets": ["q_proj", "lm_head"]}},
    "muon": {"optimizer": {"kind": "muon", "learning_rate": 3e-3}},
    "muon, Mixtral": {"optimizer": {"kind": "muon", "learning_rate": 3e-3}},
    "every second block": {"activation_checkpointing": {"kind": "full", "every": 2}},
}


def case(name: str, **engine: Any) -> Case:
    family = {"Gemma 2": "gemma2", "Mixtral": "mixtral"}.get(name.rpartition(", ")[2], "llama")
    return Case(family=family, settings=SETTINGS[name], **engine)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    cases = {name: case(name, engine="fsdp2", shard=2) for name in SETTINGS}
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_are_as_one(name: str, ranks: dict[str, Outcome]) -> None:
    """In float64, but for Gemma 2, which computes norms in float32 whatever the model's type."""
    alone = train(case(name))
    tolerance = 1e-6 if name.endswith("Gemma 2") else 1e-9
    assert ranks[name].losses == pytest.approx(alone.losses, rel=0, abs=tolerance)
    assert ranks[name].norms == pytest.approx(alone.norms, rel=0, abs=tolerance)
    assert ranks[name].validation == pytest.approx(alone.validation, abs=tolerance)
    assert ranks[name].born == alone.born
