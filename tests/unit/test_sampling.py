"""What a tokenizer is trained on, and the forecast of a store's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_recipes import make_recipe, make_site, text, text_stream, write_texts

from outgrow.recipes.schema import Recipe
from outgrow.streaming.build import build
from outgrow.streaming.sampling import forecast_bytes, sample_texts
from outgrow.streaming.sources import Source, open_source
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.tokenizer import TextTokenizer


def opened(root: Path, recipe: Recipe, **folders: Path) -> dict[str, Source]:
    site = make_site(root, **folders)
    return {s.name: open_source(s, site, DigestCache(root / "cache")) for s in recipe.data.streams}


def sampled(root: Path, limit_bytes: int, **folders: Path) -> list[str]:
    recipe = make_recipe(*(text_stream(name) for name in folders))
    return list(sample_texts(recipe.data, opened(root, recipe, **folders), limit_bytes))


def test_a_tokenizer_is_trained_on_the_same_share_of_every_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.streaming.sources.reading.UNIT_BYTES", 5000)
    small, large = write_texts(tmp_path / "small", 20), write_texts(tmp_path / "large", 80)
    for path in small.iterdir():
        path.write_text("S" + path.read_text())
    texts = sampled(tmp_path, 10_000, small=small, large=large)
    sizes = [sum(len(t) for t in texts if t.startswith("S")), sum(len(t) for t in texts if not t.startswith("S"))]
    assert 9_000 < sum(sizes) <= 10_000
    assert 0.15 < sizes[0] / sum(sizes) < 0.25
    assert len(texts) > 15  # from all over the folders, not from their first files alone
    assert texts == sampled(tmp_path, 10_000, small=small, large=large)


def test_all_text_is_sampled_where_the_limit_allows(tmp_path: Path) -> None:
    """Also where it is longer in UTF-8 than in its file."""
    (tmp_path / "ru").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "ru" / name).write_bytes(
            ("Москва - столица России, население города растёт. " * 20 + name).encode("cp1251")
        )
    assert [text[-5:] for text in sampled(tmp_path, 100_000, ru=tmp_path / "ru")] == ["a.txt", "b.txt"]


def dialogues(folder: Path, count: int) -> dict[str, Any]:
    """A stream of dialogues of a question and an answer."""
    folder.mkdir()
    with open(folder / "d.jsonl", "w") as file:
        for number in range(count):
            turns = [("user", text(number, 20)), ("assistant", text(1000 + number, 60))]
            file.write(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}) + "\n")
    source = {"kind": "jsonl", "path": folder.name, "shape": {"kind": "messages"}}
    return {"name": "talk", "source": source, "chat": {"template": {"kind": "named", "name": "chatml"}}}


def test_of_dialogues_every_message_is_sampled_and_cleaned_as_the_stream_asks(tmp_path: Path) -> None:
    stream = dialogues(tmp_path / "talk", 3)
    lines = (tmp_path / "talk" / "d.jsonl").read_text()
    (tmp_path / "talk" / "d.jsonl").write_text(lines.replace("alpha", "e\u0301"))
    recipe = make_recipe(stream | {"clean": [{"kind": "nfc"}]})
    texts = list(sample_texts(recipe.data, opened(tmp_path, recipe, talk=tmp_path / "talk"), 1_000_000))
    assert texts == [text(n, size).replace("alpha", "é") for k in range(3) for n, size in ((k, 20), (1000 + k, 60))]


@pytest.mark.parametrize("kind", ["texts", "dialogues"])
def test_the_forecast_of_room_is_near_the_truth(tmp_path: Path, kind: str) -> None:
    if kind == "texts":
        write_texts(tmp_path / "talk", 200)
        recipe = make_recipe(text_stream("talk"))
    else:
        recipe = make_recipe(dialogues(tmp_path / "talk", 200))
    site = make_site(tmp_path, talk=tmp_path / "talk")
    store = Path(site.open_storage().path(build(recipe, site).card.store))
    written = sum(path.stat().st_size for path in (store / "streams").rglob("*") if path.suffix in (".mds", ".safetensors"))
    forecast = forecast_bytes(recipe.data, opened(tmp_path, recipe, talk=tmp_path / "talk"), TextTokenizer(store / "tokenizer"))
    assert written < forecast < 1.5 * written
