"""Every document that is in no row is listed, with its reason and what it is like."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from text_recipes import make_recipe, make_site

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.site import Site
from outgrow.streaming import dropped as subject
from outgrow.streaming.build import build
from outgrow.streaming.contents import content_digest
from outgrow.streaming.contents import held_out as is_held_out
from outgrow.streaming.dropped import DroppedLine, as_text, dropped

FRACTION = 0.2
WORDS = ["берег", "ветер", "город", "дождь", "ещё", "жёлтый", "и", "когда", "луна", "мороз", "над", "очень", "под", "снег"]


def held_out(text: str, fraction: float) -> bool:
    return is_held_out(content_digest(text), fraction)


def prose(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=30))


def texts(count: int, validation: bool, first: int = 0) -> list[str]:
    """Texts that the build holds out, or does not."""
    found = (prose(number) for number in range(first, first + 100 * count))
    return [text for text in found if held_out(text, FRACTION) is validation][:count]


def write_lines(path: Path, records: list[str | bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, bytes) else json.dumps({"text": record}).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def make(root: Path) -> tuple[Site, DatasetCard]:
    """Two streams with documents of every reason."""
    held = texts(2, True)
    kept = texts(3, False)
    short = next(text for word in WORDS if not held_out(text := f"Вот {word}.", FRACTION))
    near = next(text for word in WORDS if not held_out(text := f"{word} {kept[1]}", FRACTION))
    english = next(
        text
        for number in range(50)
        if not held_out(text := f"The weather was good on the morning of day {number}, and everybody went out.", FRACTION)
    )
    leak = next(t for n in range(50) if not held_out(t := held[0].upper() + "!" * n, FRACTION))
    broken = b'{"text": "\x1b[31m\\u001b[31m' + b"x" * 5000
    write_lines(root / "a/a.jsonl", [*held, kept[0], kept[1], short, b"[1, 2]", "", broken])
    write_lines(root / "b/b.jsonl", [kept[0], near, leak, english, "коротко", kept[2], kept[2] * 5])
    jsonl = {"kind": "jsonl", "on_error": "quarantine"}
    recipe = make_recipe(
        {"name": "b", "source": {**jsonl, "path": "b"}, "filter": {"min_chars": 10, "max_chars": 600, "languages": ["ru"]}},
        {"name": "a", "source": {**jsonl, "path": "a"}, "split": "never", "too_long": "drop"},
        sequence_length=1024,
        validation_fraction=FRACTION,
        duplicates={"remove": "near"},
        stages=[
            {"tokens": 1000, "shares": {"a": 0.5, "b": 0.5}},
            {"shares": {"b": 1.0}, "sequence_length": 64},
        ],
    )
    return make_site(root, a=root / "a", b=root / "b"), build(recipe, make_site(root, a=root / "a", b=root / "b")).card


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, DatasetCard]:
    return make(tmp_path_factory.mktemp("dropped"))


def test_every_reason_is_listed_with_its_detail(made: tuple[Site, DatasetCard]) -> None:
    found = [(line.stream, line.split, line.source, line.reason) for line in dropped(*made)]
    details = {(line.source, line.reason): line.detail for line in dropped(*made)}
    assert found == [
        ("a", "", "a.jsonl#6", "malformed"),
        ("a", "", "a.jsonl#7", "empty"),
        ("a", "", "a.jsonl#8", "malformed"),
        ("a", "train", "a.jsonl#3", "duplicate"),
        ("a", "train", "a.jsonl#4", "near_duplicate"),
        # What the row index of the shorter length adds.
        ("a", "validation", "a.jsonl#1", "too_long"),
        ("a", "validation", "a.jsonl#2", "too_long"),
        ("b", "train", "b.jsonl#3", "like_validation"),
        ("b", "train", "b.jsonl#4", "language"),
        ("b", "train", "b.jsonl#5", "too_short"),
        ("b", "train", "b.jsonl#7", "too_long_text"),
    ]
    assert details["a.jsonl#3", "duplicate"] == "like b.jsonl#1"
    assert details["a.jsonl#4", "near_duplicate"] == "like b.jsonl#2"
    assert details["b.jsonl#3", "like_validation"] == "like a.jsonl#1 (held out)"
    assert details["b.jsonl#4", "language"] == "its language is en"
    assert details["b.jsonl#5", "too_short"] == "7 characters"
    assert details["a.jsonl#1", "too_long"].endswith("tokens; a row has 64")


def test_a_stream_and_a_reason_can_be_asked_for(made: tuple[Site, DatasetCard]) -> None:
    every = list(dropped(*made))
    for stream in ("a", "b"):
        assert list(dropped(*made, stream=stream)) == [line for line in every if line.stream == stream]
    for reason in {line.reason for line in every}:
        assert list(dropped(*made, reason=reason)) == [line for line in every if line.reason == reason]
    assert [line.source for line in dropped(*made, "b", "language")] == ["b.jsonl#4"]
    assert list(dropped(*made, "b", "duplicate")) == []


def test_counts_are_those_of_the_card(made: tuple[Site, DatasetCard]) -> None:
    for stream in made[1].streams:
        lines = [line for line in dropped(*made, stream=stream.name) if "a row has 64" not in line.detail]
        assert Counter(line.reason for line in lines) == stream.dropped


def test_few_at_once_give_the_same_lines(made: tuple[Site, DatasetCard], monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(dropped(*made))
    monkeypatch.setattr(subject, "_AT_ONCE", 1)
    assert list(dropped(*made)) == every


def test_what_cannot_be_asked_for_is_named(made: tuple[Site, DatasetCard]) -> None:
    with pytest.raises(DataError, match=r"no stream 'c'\n.*a, b"):
        dropped(*made, stream="c")
    with pytest.raises(DataError, match=r"'kept'\n.*empty.*near_duplicate"):
        dropped(*made, reason="kept")


def test_quarantined_content_is_shown_and_steers_no_terminal(made: tuple[Site, DatasetCard]) -> None:
    line = next(line for line in dropped(*made) if line.source == "a.jsonl#8")
    assert len(line.content) > 5000
    shown = as_text(line)
    assert shown.startswith("a  malformed  a.jsonl#8: ")
    assert "\x1b" not in shown and "\\x1b[31m" in shown
    assert "xxx" in shown and len(shown) < 2500 and f"{len(line.content) - 2000:,} characters more" in shown
    # Nor does a name, nor a line end in it.
    odd = DroppedLine(source="a\x1b]0;\n\u202eb.txt", stream="a", split="train", reason="duplicate", detail="like c")
    assert as_text(odd) == r"a.train  duplicate  a\x1b]0;\n\u202eb.txt: like c"


def test_a_damaged_list_is_not_read(tmp_path: Path) -> None:
    site, card = make(tmp_path)
    path = next(Path(site.storage).rglob("a/dropped.jsonl"))
    path.write_text(path.read_text().replace("malformed", "undecoded"))
    with pytest.raises(IntegrityError, match="differs from its digest"):
        list(dropped(site, card))
