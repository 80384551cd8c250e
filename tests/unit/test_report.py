"""The report of a dataset: its figures are right, it loads nothing, and no text of a document can do anything in it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lxml import html
from text_recipes import make_recipe, make_site

from outgrow.contracts import DatasetCard
from outgrow.html_page import visible
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.build import build
from outgrow.streaming.report import make_report, samples
from outgrow.streaming.report.clusters import biggest_clusters, cluster_sizes
from outgrow.streaming.report.facts import look_through, mix_parts, stream_facts
from outgrow.streaming.report.lengths import Lengths
from outgrow.streaming.row_files import DroppedTable
from outgrow.streaming.selection import REASONS
from outgrow.streaming.tiers.on_demand import open_dataset

RUSSIAN = ["мороз", "солнце", "день", "чудесный", "ещё", "ты", "дремлешь", "друг", "прелестный", "пора", "красавица", "снег"]
ENGLISH = ["it", "was", "the", "best", "of", "times", "worst", "age", "wisdom", "season", "light", "darkness"]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} </pre><a href='http://evil.example/'>x</a> \u202eabc"
SHAPE = {"shape": {"kind": "messages"}}


def prose(rng: random.Random, words: list[str], count: int) -> str:
    return " ".join(rng.choice(words) for _ in range(count)).capitalize() + "."


def write(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def make(root: Path, **data: Any) -> tuple[Site, DatasetCard, Recipe]:
    """Texts, dialogues and preference pairs, with duplicates, languages, a hostile dialogue and hostile file names."""
    rng = random.Random(0)
    texts = [prose(rng, RUSSIAN if n % 4 else ENGLISH, rng.randint(20, 200)) for n in range(80)]
    write(root / "texts/<b onclick=x>&amp.jsonl", [{"text": text} for text in [*texts, *texts[:5], *[texts[7]] * 3, "да"]])
    talks = [
        [{"role": "user", "content": f"{n} {HOSTILE}"}, {"role": "assistant", "content": HOSTILE + prose(rng, RUSSIAN, 20)}]
        for n in range(40)
    ]
    write(root / "talks/t.jsonl", [{"messages": talk} for talk in talks])
    pairs = [{"prompt": prose(rng, RUSSIAN, 5), "chosen": prose(rng, RUSSIAN, 9), "rejected": "нет"} for _ in range(12)]
    write(root / "pairs/p.jsonl", [*pairs, {"prompt": 7}])
    talks_mix = {} if "stages" in data else {"epochs": 9}
    chatml = {"template": {"kind": "named", "name": "chatml"}}
    jsonl = {"kind": "jsonl", "on_error": "skip"}
    recipe = make_recipe(
        {
            "name": "texts",
            "source": jsonl | {"path": "texts"},
            "clean": [{"kind": "nfc"}, {"kind": "look_alikes"}],
            "filter": {"min_chars": 10},
        },
        {"name": "talks", "source": jsonl | {"path": "talks", **SHAPE}, "chat": chatml, "split": "never"} | talks_mix,
        {
            "name": "pairs",
            "source": jsonl | {"path": "pairs", "shape": {"kind": "preference"}},
            "chat": chatml,
            "split": "never",
        },
        **{"sequence_length": 2048, "duplicates": {"remove": "exact"}, **data},
    )
    site = make_site(root, texts=root / "texts", talks=root / "talks", pairs=root / "pairs")
    return site, build(recipe, site).card, recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, DatasetCard, Recipe]:
    return make(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(made: tuple[Site, DatasetCard, Recipe]) -> str:
    return make_report(*made)


@pytest.fixture(scope="module")
def tree(page: str) -> Any:
    return html.document_fromstring(page)


def tables(tree: Any) -> dict[str, list[list[str]]]:
    """Rows of every table by the title of its section."""
    return {
        section.findtext(".//h2"): [[cell.text_content() for cell in row.iter("th", "td")] for row in section.iter("tr")]
        for section in tree.iter("section")
        if section.find(".//table") is not None
    }


# --- safety -----------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(tree: Any) -> None:
    assert not tree.xpath("//*[@src or @href or @action or @data or @srcset or @poster]")
    assert not tree.xpath("//link | //img | //iframe | //object | //embed | //form | //base | //a | //svg")
    style = tree.findtext(".//style")
    assert "url(" not in style and "@import" not in style
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none';") and "http" not in policy and "unsafe-eval" not in policy


def test_only_the_two_scripts_of_the_page_may_run(tree: Any) -> None:
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    allowed = policy.partition("script-src ")[2].split()
    scripts = [script.text for script in tree.iter("script") if script.get("type") is None]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert allowed == [f"'sha256-{digest}'" for digest in digests] and len(scripts) == 2
    assert not [name for element in tree.iter() for name in element.attrib if name.startswith("on")]


def test_hostile_text_is_text(tree: Any, page: str) -> None:
    before_scripts = page.partition("<script")[0]
    assert "alert(1)" in before_scripts  # it is in a sample, so the test tests something
    assert "<script>alert" not in page and "<img" not in page and "evil.example/'>" not in before_scripts
    shown = [pre.text_content() for pre in tree.iter("pre")]
    assert any(visible(HOSTILE) in text for text in shown)
    assert any("⟨U+202E⟩" in text for text in shown) and "\u202e" not in page
    assert any("{{ 7*7 }}" in text for text in shown)
    assert "<b onclick=x>&amp.jsonl#" in tree.text_content() and not tree.xpath("//b[@onclick]")


def test_figures_cannot_end_their_script(tree: Any) -> None:
    figures = tree.get_element_by_id("figures").text
    assert "<" not in figures and "&" not in figures
    places = {name for name in json.loads(figures)}
    assert places == {div.get("id") for div in tree.iter("div") if "plot" in div.get("class", "").split()}


def test_hidden_characters_are_spelled_out() -> None:
    assert visible("a\x00b\u200b\u202ec\n\td\ud800") == "a⟨U+0000⟩b⟨U+200B⟩⟨U+202E⟩c\n\td⟨U+D800⟩"
    assert visible("Ёлка 山 é 👍") == "Ёлка 山 é 👍"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_card(tree: Any, made: tuple[Site, DatasetCard, Recipe]) -> None:
    _, card, _ = made
    rows = {row[0]: row for row in tables(tree)["What there is"]}
    for stream in card.streams:
        own = rows[stream.name]
        assert own[2:4] == [f"{stream.documents:,}", f"{stream.tokens:,}"]
        assert own[5:7] == [f"{stream.validation_documents:,}", f"{sum(stream.dropped.values()):,}"]
    assert rows["texts"][4].startswith("9")  # learned: all tokens of a text but the first
    assert 20 < float(rows["talks"][4].rstrip("%")) < 80
    assert [row[0] for row in tables(tree)["What there is"][1:]] == ["texts", "talks", "pairs"]  # the recipe's order
    figures = json.loads(tree.get_element_by_id("figures").text)
    bars = {bar["name"]: dict(zip(bar["y"], bar["x"], strict=True)) for bar in figures["tokens"]["data"]}
    assert bars["training"] == {stream.name: stream.tokens for stream in card.streams}
    assert bars["held out"] == {stream.name: stream.validation_tokens for stream in card.streams}


def test_drops_are_listed_with_their_reason(tree: Any, made: tuple[Site, DatasetCard, Recipe]) -> None:
    _, card, _ = made
    found = {(row[0], row[1]): (int(row[2]), row[4]) for row in tables(tree)["What was dropped"][1:]}
    assert {key: count for key, (count, _) in found.items()} == {
        (stream.name, reason): count for stream in card.streams for reason, count in stream.dropped.items()
    }
    assert found["texts", "duplicate"][0] + found.get(("texts", "like_validation"), (0, ""))[0] == 8
    assert found["texts", "too_short"] == (1, "<b onclick=x>&amp.jsonl#89: 2 characters")
    assert found["pairs", "malformed"][0] == 1


def test_languages_and_tokens_a_word_are_those_of_the_texts(tree: Any) -> None:
    languages = {(row[0], row[1]): int(row[2]) for row in tables(tree)["Languages"][1:]}
    assert languages["texts", "ru"] > 2 * languages["texts", "en"] > 10
    rows = {row[0]: row for row in tables(tree)["Tokens a word"][1:]}
    assert float(rows["ru"][2]) > 1  # characters a token
    assert int(rows["ru"][3].replace(",", "")) > 500
    # A vocabulary of 300 takes nearly a token a byte, and is warned of.
    assert float(rows["ru"][1]) > 2.5
    advice = tree.get_element_by_id("look-first").text_content()
    assert "tokens a word of 'ru'" in advice and "raise data.tokenizer.vocab_size (now 300)" in advice


def test_what_is_learned_is_marked(tree: Any, made: tuple[Site, DatasetCard, Recipe]) -> None:
    articles = list(tree.iter("article"))
    talks = [own for own in articles if "t.jsonl" in own.findtext(".//header/span")]
    for own in talks:
        for mark in own.iter("mark"):
            assert "user" not in mark.text_content() and "<|im_end|>" in mark.text_content()
        assert len(list(own.iter("mark"))) == 1
    texts = [own for own in articles if "amp.jsonl" in own.findtext(".//header/span")]
    assert texts and all(not list(own.iter("mark")) and "all of it is learned" in own.text_content() for own in texts)
    pairs = [own for own in articles if own.findtext(".//header/span").startswith("p.jsonl")]
    assert len(pairs) == 3
    for own in pairs:
        assert [div.text for div in own.iter("div")] == ["chosen", "rejected"]
        assert [mark.text_content().strip() for mark in own.iter("mark")][1] == "нет<|im_end|>"


def test_the_mix_is_that_of_the_run(made: tuple[Site, DatasetCard, Recipe], tree: Any) -> None:
    site, card, recipe = made
    part = mix_parts(recipe, card)[-1]
    assert part.steps == -(-1000 // (4 * 2048))
    advice = tree.get_element_by_id("look-first").text_content()
    assert "held-out" not in advice
    long = recipe.model_copy(update={"duration": recipe.duration.model_copy(update={"tokens": None, "epochs": 2})})
    epoch, run = mix_parts(long, card)
    assert {name: round(passes) for name, passes in epoch.passes.items()} == {"texts": 1, "talks": 9, "pairs": 1}
    assert {name: passes / epoch.passes[name] for name, passes in run.passes.items()} == {"texts": 2, "talks": 2, "pairs": 2}
    assert run.tokens["texts"] == pytest.approx(2 * next(own.tokens for own in card.streams if own.name == "texts"))


def test_the_same_dataset_gives_the_same_page(made: tuple[Site, DatasetCard, Recipe], page: str) -> None:
    assert make_report(*made) == page


def test_stages_and_two_lengths_of_rows_are_shown(tmp_path: Path) -> None:
    stages = [
        {"tokens": 40_000, "shares": {"texts": 0.5, "talks": 0.5}},
        {"shares": {"talks": 1.0}, "sequence_length": 4096},
    ]
    site, card, recipe = make(tmp_path, stages=stages, duplicates={"remove": "none"})
    recipe = recipe.model_copy(update={"duration": recipe.duration.model_copy(update={"tokens": 80_000})})
    first, second, run = mix_parts(recipe, card)
    assert first.steps + second.steps == run.steps and "4,096" in second.name
    assert second.tokens["texts"] == 0 and first.tokens["texts"] == pytest.approx(first.tokens["talks"], rel=0.2)
    tree = html.document_fromstring(make_report(site, card, recipe))
    assert {row[1] for row in tables(tree)["Rows"][1:]} == {"2,048", "4,096"}
    assert "Duplicates were not looked for" in tree.text_content()


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_sample_is_spread_and_bounded(
    made: tuple[Site, DatasetCard, Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site, card, recipe = made
    with open_dataset(site, card) as dataset:
        opened = look_through(dataset, card)
    stream = stream_facts(opened, card, recipe)[0]
    every = samples._spread(opened, "texts")
    assert len(every) == stream.documents["training"]
    documents = opened.dataset.documents("texts", "train", open_shards=1)
    assert len({documents.tokens(number).tobytes() for number in every.tolist()}) == len(every)  # no duplicate among them
    monkeypatch.setattr(samples, "DOCUMENTS", 10)
    few = samples._spread(opened, "texts")
    assert len(few) == 10 and set(few.tolist()) <= set(every.tolist())
    assert few[0] == every[0] and few[-1] > every[-len(every) // 5]


def test_a_sample_of_many_shards_reads_few(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.arange(10, 1010, 10)
    monkeypatch.setattr(samples, "read_our_shards", lambda folder, expected: type("Shards", (), {"ends": ends}))
    dropped = np.arange(0, 1000, 2)
    none = np.zeros(len(dropped), np.int64)
    table = DroppedTable(document=dropped, reason=none, twin_stream=none, twin_validation=none, twin=none)  # type: ignore[arg-type]
    opened: Any = type("Opened", (), {"store": Path(), "digests": Counter(), "dropped": {("s", "train"): table}})
    found = samples._spread(opened, "s")
    assert len({number // 10 for number in found.tolist()}) == samples.SHARDS_READ
    assert len(found) == samples.SHARDS_READ * 5 and all(number % 2 for number in found.tolist())
    assert found[0] < 100 and found[-1] > 900


@pytest.mark.parametrize("seed", range(5))
def test_lengths_are_counted_and_their_quantiles_close(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(6, 2, 3000).astype(np.int64) + 1
    found = Lengths()
    for part in np.split(lengths, 5):
        found.add(part)
    assert found.documents.sum() == 3000 and found.tokens.sum() == lengths.sum() and found.longest == lengths.max()
    for share in (0.1, 0.5, 0.9, 1.0):
        exact = int(np.quantile(lengths, share, method="inverted_cdf"))
        assert exact - 1 <= found.quantile(share) <= exact * 1.0443 + 1
    assert found.longer_than(1024) == pytest.approx((lengths > 1024).mean(), abs=0.03)
    edges, documents, tokens = found.coarse()
    assert documents.sum() == 3000 and tokens.sum() == lengths.sum() and len(edges) == len(documents) + 1
    assert edges[0] <= lengths.min() and lengths.max() <= edges[-1]


def test_no_length_at_all() -> None:
    empty = Lengths()
    assert (empty.quantile(0.5), empty.longest, empty.longer_than(10)) == (0, 0, 0.0)
    assert len(empty.coarse()[1]) == 0


def test_clusters_are_those_of_counting_one_by_one() -> None:
    rng = np.random.default_rng(3)
    dropped, slow = {}, Counter[tuple[int, bool, int]]()
    for name in ("a", "b"):
        for split in ("train", "validation"):
            count = 200
            twin = np.where(rng.random(count) < 0.8, rng.zipf(1.5, count) % 40, -1)
            dropped[name, split] = DroppedTable(
                document=np.arange(count) * 3,
                reason=np.where(twin >= 0, 4, 1).astype(np.uint8),
                twin_stream=np.where(twin >= 0, rng.integers(0, 2, count), -1).astype(np.int16),
                twin_validation=(twin >= 0) & (rng.random(count) < 0.3),
                twin=twin,
            )
            table = dropped[name, split]
            for place in np.flatnonzero(twin >= 0).tolist():
                slow[int(table.twin_stream[place]), bool(table.twin_validation[place]), int(twin[place])] += 1
    found = biggest_clusters(dropped, ["a", "b"], lambda name, split, number: (f"{name}.{split}#{number}", "text"))  # type: ignore[arg-type]
    assert [cluster.size for cluster in found] == sorted(slow.values(), reverse=True)[: len(found)]
    for cluster in found:
        kept = cluster.kept.partition("#")
        assert slow["ab".index(kept[0][0]), "validation" in kept[0], int(kept[2])] == cluster.size
        assert cluster.held_out == ("validation" in kept[0]) and cluster.kept_stream == kept[0][0]
        assert cluster.reasons == {REASONS[4]: cluster.size} and len(cluster.examples) == min(3, cluster.size)
    assert cluster_sizes(dropped) == sorted(Counter(slow.values()).items())  # type: ignore[arg-type]
    assert biggest_clusters({}, [], lambda *_: ("", "")) == [] and cluster_sizes({}) == []
