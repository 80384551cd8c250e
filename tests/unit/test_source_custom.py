"""Custom sources: what a function may yield, what it is named by, and what is said when it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opened_sources import dropped, everything, texts
from text_recipes import make_recipe, make_site

from outgrow.errors import DataError
from outgrow.streaming.sources import Dialogue, Document, PreferencePair, Source, open_source
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import Content

USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "b"}
calls = 0


def numbered(count: int, *, steady: bool = True) -> Iterator[Document]:
    """A custom source; unless ``steady``, other documents at each call."""
    global calls
    calls += 1
    for number in range(count):
        yield Document(content=f"document {number} {0 if steady else calls}", source=f"numbered#{number}", meta={"n": number})


def wrong() -> list[str]:
    return ["a plain string"]


def failing() -> Iterator[Document]:
    yield Document(content="one", source="failing#0")
    raise RuntimeError("midway")


CONTENTS: list[Any] = []
META: dict[str, Any] = {}


def given() -> Iterator[Document]:
    for number, content in enumerate(CONTENTS):
        yield Document(content=content, source=f"given#{number}", meta=META)


def opened(root: Path, name: str, **options: Any) -> Source:
    recipe = make_recipe({"name": "s", "source": {"kind": "custom", "factory": f"{__name__}:{name}", "options": options}})
    return open_source(recipe.data.streams[0], make_site(root), DigestCache(root / "cache"))


def of(root: Path, *contents: Any, monkeypatch: pytest.MonkeyPatch, meta: dict[str, Any] | None = None) -> Source:
    monkeypatch.setattr(f"{__name__}.CONTENTS", list(contents))
    monkeypatch.setattr(f"{__name__}.META", meta or {})
    return opened(root, "given")


def test_a_custom_source_is_named_by_what_it_yields(tmp_path: Path) -> None:
    source = opened(tmp_path, "numbered", count=5)
    assert texts(source) == [f"document {number} 0" for number in range(5)]
    source.check_unchanged()
    assert source.inputs == opened(tmp_path, "numbered", count=5).inputs
    assert source.inputs[0].digest != opened(tmp_path, "numbered", count=6).inputs[0].digest

    restless = opened(tmp_path, "numbered", count=5, steady=False)
    everything(restless)
    with pytest.raises(DataError, match="other documents"):
        restless.check_unchanged()


def test_every_kind_of_content_passes_and_has_its_own_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Dialogue(messages=(USER,))
    contents: list[Content] = [
        "u",
        "ub",
        np.array([1, 2]),
        np.array([1, 3]),
        Dialogue(messages=(USER,)),
        Dialogue(messages=(USER, BOT)),
        Dialogue(messages=(USER, BOT), tools=({"type": "function", "function": {"name": "f"}},)),
        PreferencePair(prompt=prompt, chosen=(BOT,), rejected=({"role": "assistant", "content": "c"},)),
        PreferencePair(prompt=prompt, rejected=(BOT,), chosen=({"role": "assistant", "content": "c"},)),
    ]
    digests = [of(tmp_path, content, monkeypatch=monkeypatch).inputs[0].digest for content in contents]
    digests.append(of(tmp_path, "u", meta={"a": 1}, monkeypatch=monkeypatch).inputs[0].digest)
    assert len(set(digests)) == len(contents) + 1
    found = everything(of(tmp_path, *contents, monkeypatch=monkeypatch))
    for document, content in zip(found, contents, strict=True):
        assert isinstance(document, Document)
        if isinstance(content, np.ndarray):
            np.testing.assert_array_equal(document.content, content)
        else:
            assert document.content == content


def test_messages_are_brought_into_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"role": "bot", "content": "<think>t</think>b", "name": None}
    (found,) = everything(of(tmp_path, Dialogue(messages=(USER, told)), monkeypatch=monkeypatch))
    assert isinstance(found, Document)
    assert found.content == Dialogue(messages=(USER, {**BOT, "reasoning_content": "t"}))
    (found,) = everything(of(tmp_path, np.array([1, 2], np.uint16), monkeypatch=monkeypatch))
    assert isinstance(found, Document) and isinstance(found.content, np.ndarray) and found.content.dtype == np.int64


def test_empty_documents_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = of(tmp_path, "", "a", " \n", np.array([], np.int64), Dialogue(messages=()), monkeypatch=monkeypatch)
    assert dropped(source) == [(f"given#{number}", "empty") for number in (0, 2, 3, 4)]
    assert texts(source) == ["a"]


@pytest.mark.parametrize(
    ("content", "meta", "reason"),
    [
        (5, {}, "its content is a number; allowed: a text, token ids"),
        (None, {}, "its content is null; allowed"),
        ([1, 2], {}, "its content is a list; allowed"),
        (np.array([0.5]), {}, "its content is a ndarray; allowed"),
        (np.array([[1]]), {}, "its content is a ndarray; allowed"),
        (Dialogue(messages=({"role": "usr", "content": "u"},)), {}, r"messages\[0\]\.role is 'usr'"),
        (Dialogue(messages=({"role": "user", "content": "u", "x": {1}},)), {}, "not JSON.*set"),
        (Dialogue(messages=(USER,), tools=({"x": 1},)), {}, r"tools\[0\] names no function"),
        ("a", {"x": {1, 2}}, "not JSON.*set"),
        ("a", {"x": float("nan")}, "not JSON"),
        ("a", {"x": "\ud800"}, "half of a surrogate pair"),
        ("\ud800", {}, "half of a surrogate pair"),
        ("a", None, ""),
    ],
)
def test_documents_that_cannot_be_kept_are_refused(
    tmp_path: Path, content: Any, meta: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.CONTENTS", ["fine", content])
    if meta is None:
        monkeypatch.setattr(f"{__name__}.META", ["no dict"])
        reason = "its source must be a text, and its meta a dict"
    elif meta:
        monkeypatch.setattr(f"{__name__}.META", meta)
    with pytest.raises(DataError, match=rf"given, document {0 if meta or meta is None else 1}: .*{reason}"):
        opened(tmp_path, "given")


@pytest.mark.parametrize(("name", "options", "reason"), [
    ("wrong", {}, "wrong, document 0: it is a text; it must be outgrow.streaming.sources.Document"),
    ("absent", {}, "cannot be imported"), ("numbered", {"count": 0}, "no document"),
    ("numbered", {"cuont": 1}, "numbered: TypeError: .*cuont"), ("failing", {}, "failing: RuntimeError: midway"),
])  # fmt: skip
def test_a_custom_source_that_is_wrong_is_refused(tmp_path: Path, name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        opened(tmp_path, name, **options)


def test_a_custom_source_whose_module_is_no_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_python_at_all.py").write_text("def documents(:")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = make_recipe({"name": "s", "source": {"kind": "custom", "factory": "no_python_at_all:documents"}})
    with pytest.raises(DataError, match="no_python_at_all:documents: it cannot be imported: SyntaxError"):
        open_source(recipe.data.streams[0], make_site(tmp_path), DigestCache(tmp_path / "cache"))
