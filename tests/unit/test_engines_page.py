"""docs/engines.md is fresh, and says of every engine what it is."""

from __future__ import annotations

import pytest

from outgrow.contracts import Refusal
from outgrow.recipes import matrix_page
from outgrow.recipes.combinations import ENGINES, EXPERTS, METHODS, RULES


def test_page_is_fresh() -> None:
    assert matrix_page.PAGE.read_text() == matrix_page.page(), "run: python -m outgrow.recipes.matrix_page"


def test_page_has_every_method_engine_and_rule() -> None:
    text = matrix_page.page()
    for method in METHODS:
        assert f"\n| {method} | " in text
    for engine in ENGINES:
        assert f"\n| {engine} | " in text
    for rule in (*RULES, EXPERTS):
        assert f"\n| {rule.asked} | " in text
    assert text.count("| yes") == len(METHODS) * len(ENGINES), "every method trains with every engine"


def test_a_cell_that_is_refused_names_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Refusal(asked="LoRA with ZeRO", available="it cannot", nearest="parallel=fsdp2")
    monkeypatch.setattr(matrix_page, "refusals", lambda recipe, device: [refusal] if recipe.adapter.kind == "lora" else [])
    assert "| full | `none` | yes |" in matrix_page.page()
    assert "| LoRA | `lora` | no: LoRA with ZeRO |" in matrix_page.page()
