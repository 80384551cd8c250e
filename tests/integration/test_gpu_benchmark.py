"""What ``benchmarks/gpu.py`` does around its measurements: memory given back, rows that fail, a file that is always whole."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "attempts", "packed_weights", "random_weights", "report", "sections", "training")
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, with its parts importable by the names that it imports them by; what a trial sets is set back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield importlib.import_module("gpu")
    torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(False)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def sections(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("sections")


@pytest.fixture
def models(sections: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """Every model that a trial began with; each must be gone when the next trial begins, by no luck of the collector."""
    training = sys.modules["training"]
    found: list[weakref.ref[Any]] = []
    made = training.meta_model

    def meta_model(*args: Any) -> Any:
        assert [reference for reference in found if reference() is not None] == []
        model = made(*args)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(training, "meta_model", meta_model)
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize(("name", "trials"), [("pretraining", 2), ("qlora", 2), ("switches", 3)])
def test_a_model_is_gone_before_the_next_one_is_made(
    name: str, trials: int, sections: ModuleType, models: list[weakref.ref[Any]]
) -> None:
    lines = list(sections.SECTIONS[name](CPU, True))
    assert len(models) == trials and not any("Assertion" in line for line in lines), lines
    assert all(reference() is None for reference in models)


def test_a_model_is_gone_after_a_trial_that_raised(
    sections: ModuleType, models: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = sys.modules["training"]
    recipe = training.recipe_of(sections.TOY_LENGTH, 2, 2)

    def fails(*given: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an | illegal\nmemory access")

    def said(place: Any, name: str) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(place, name, fails)
            found = sections._measured(sections.TOY, recipe, CPU, 1)
        assert "in fails" in capsys.readouterr().err, "the traceback says where"
        return str(found.text)

    expected = "RuntimeError: Triton Error [CUDA]: an | illegal"
    assert said(training, "make_engine") == expected
    assert said(training.RandomWeights, "read") == expected
    assert said(training.FiniteWatch, "see") == expected
    with pytest.raises(RuntimeError), training.trial(sections.TOY, recipe, CPU) as made:
        made.step()
        raise RuntimeError
    assert vars(made) == {}
    assert isinstance(sections._measured(sections.TOY, recipe, CPU, 1), training.Measured)
    assert len(models) == 5
    assert training.row(["a | b", 1]) == "| a / b | 1 |"


def test_memory_is_filled_as_in_a_run(sections: ModuleType) -> None:
    training = sys.modules["training"]
    with training.trial(sections.TOY, training.recipe_of(sections.TOY_LENGTH, 2, 2, deterministic=True), CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_one_switch_that_fails_leaves_the_others(sections: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "SWITCHES", {"loss in parts": {"attention": "varlen"}})
    *_, none, refused = sections.switches(CPU, True)
    assert none.startswith("| none | ") and refused.startswith("| loss in parts | attention varlen "), refused


def test_ratios_are_to_the_mean_of_what_was_measured(sections: ModuleType) -> None:
    training = sys.modules["training"]
    found = training.Measured(tokens_per_s=3.0, mfu=None, peak_bytes=4 * 10**9, reserved_bytes=0, loss=1.0)
    slower = replace(found, tokens_per_s=2.0, peak_bytes=2 * 10**9)
    assert sections._against(found, [slower, replace(slower, tokens_per_s=1.0)]) == ["3", "2.000", "4.0", "2.00"]
    assert sections._against(found, []) == ["3", "", "4.0", ""]
    attempts = sys.modules["attempts"]
    assert sections._against(attempts.Failed("no"), [slower]) == ["no", "", "", ""]
    assert attempts.attempt(lambda: training.recipe_of(8, 2, 2, optimizer=1), CPU).text.startswith("ValidationError")
    assert attempts.in_a_line(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"


def test_a_lost_device_ends_a_section_with_what_there_is(
    gpu: ModuleType, sections: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "gpu.md"
    answers = iter([True, False])
    monkeypatch.setattr(sys.modules["attempts"], "answers", lambda device: next(answers))
    assert not gpu.run("pretraining", True, out)
    text = out.read_text()
    assert "| 2 | full |" in text and "| 2 | selective |" not in text
    assert text.endswith("Ended early: DeviceLost: the device answers no more after the error before\n")
    assert "| 2 | full |" in capsys.readouterr().err


def test_sections_land_in_one_file(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = importlib.import_module("report")
    out = tmp_path / "gpu.md"
    for title, rows in (("One", 1), ("Two", 2), ("One", 3)):
        written = report.Report(out, title, "how")
        for number in range(rows):
            written.add(f"| {number} |")
            assert report.UNFINISHED in out.read_text() and f"| {number} |\n" in out.read_text()
        written.end()
    assert report.sections_of(out.read_text()) == {"One": "how\n\n| 0 |\n| 1 |\n| 2 |", "Two": "how\n\n| 0 |\n| 1 |"}
    assert report.text_of(report.sections_of(out.read_text())) == out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.md"]
    report.Report(None, "nowhere", "how").end()


def test_what_is_missing_is_named(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pydantic", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not gpu.run("qlora", True, tmp_path / "gpu.md")
    assert not gpu.run("switches", True, tmp_path / "gpu.md")
    assert capsys.readouterr().err.splitlines() == [
        "qlora: not measured, as not installed here: pydantic, bitsandbytes",
        "switches: not measured, as not installed here: pydantic",
    ]
    assert not list(tmp_path.iterdir()), "what was measured before stays"


def test_every_section_has_a_title(gpu: ModuleType, sections: ModuleType) -> None:
    assert list(gpu.SECTIONS) == list(sections.SECTIONS)
    assert len({section.title for section in gpu.SECTIONS.values()}) == len(gpu.SECTIONS)
