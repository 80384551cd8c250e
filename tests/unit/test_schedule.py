"""Learning rates: each schedule against a slow twin that draws the curve through its corner points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from outgrow.errors import RecipeError
from outgrow.recipes.schema.training import Schedule
from outgrow.trainers.schedule import share_of_peak

STEPS = 101


def curve(steps: int = STEPS, **schedule: Any) -> np.ndarray:
    parsed = TypeAdapter(Schedule).validate_python(schedule)
    return np.array([share_of_peak(parsed, step, steps) for step in range(steps)])


def through(*corners: tuple[int, float]) -> np.ndarray:
    """Straight lines through (step, share)."""
    return np.interp(np.arange(STEPS), [step for step, _ in corners], [share for _, share in corners])


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 100])
def test_constant(warmup: int) -> None:
    expected = through((-1, 0.0), (warmup - 1, 1.0), (STEPS, 1.0)) if warmup else np.ones(STEPS)
    np.testing.assert_allclose(curve(kind="constant", warmup_steps=warmup), expected, atol=1e-15)


@pytest.mark.parametrize(("warmup", "peak"), [(0, 0), (1, 0), (11, 10)])
def test_linear(warmup: int, peak: int) -> None:
    found = curve(kind="linear", warmup_steps=warmup, final_fraction=0.2)
    corners = [(peak, 1.0), (STEPS - 1, 0.2)]
    np.testing.assert_allclose(found, through(*([(-1, 0.0)] if warmup > 1 else []), *corners), atol=1e-15)
    assert found[-1] == pytest.approx(0.2, abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 11])
def test_cosine(warmup: int) -> None:
    found = curve(kind="cosine", warmup_steps=warmup, final_fraction=0.1)
    peak = max(warmup - 1, 0)
    angle = np.linspace(0.0, np.pi, STEPS - peak)
    np.testing.assert_allclose(found[peak:], 0.1 + 0.9 * (1 + np.cos(angle)) / 2, atol=1e-14)
    np.testing.assert_allclose(found[:peak], np.arange(1, peak + 1) / max(warmup, 1), atol=1e-15)


def test_warmup_stable_decay() -> None:
    found = curve(kind="warmup_stable_decay", warmup_steps=5, decay_fraction=0.2, final_fraction=0.05)
    np.testing.assert_allclose(found, through((-1, 0.0), (4, 1.0), (STEPS - 1 - 20, 1.0), (STEPS - 1, 0.05)), atol=1e-14)


def test_decay_that_would_begin_within_the_warmup_begins_at_the_peak() -> None:
    found = curve(kind="warmup_stable_decay", warmup_steps=31, decay_fraction=1.0)
    np.testing.assert_allclose(found, through((-1, 0.0), (30, 1.0), (STEPS - 1, 0.0)), atol=1e-14)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_a_run_no_longer_than_its_warmup_only_rises(kind: str) -> None:
    np.testing.assert_allclose(curve(4, kind=kind, warmup_steps=4), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(curve(1, kind=kind), [1.0])


def test_custom_schedule_is_called_with_step_steps_and_options() -> None:
    found = curve(4, kind="custom", factory=f"{__name__}:triangle", options={"top": 2})
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.5])


def triangle(*, step: int, steps: int, top: float) -> float:
    return top * step / steps


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "no_such_module:rate",
            "no_such_module:rate cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("math:no_such", "math:no_such cannot be imported: AttributeError: module 'math' has no attribute 'no_such'"),
        (
            "builtins:dict",
            "builtins:dict returned {'step': 0, 'steps': 101} for step 0; allowed: a finite number of at least 0",
        ),
    ],
)
def test_custom_schedule_at_fault_is_refused(factory: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        curve(kind="custom", factory=factory)
    assert str(caught.value).startswith(f"schedule.factory: {message}")
