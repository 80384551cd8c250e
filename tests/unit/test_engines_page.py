"""docs/engines.md is fresh, and says of every engine what it is."""

from __future__ import annotations

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
    assert "no (1)" in text and "\n1. " in text
