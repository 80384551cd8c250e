"""``build``: same bytes however it is run, nothing done twice, nothing half done, and MosaicML's reader agrees with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from text_recipes import make_recipe, make_site, text, text_stream, write_texts

from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import tree_digests
from outgrow.streaming.build import build, find
from outgrow.streaming.card import describe
from outgrow.streaming.inspect import first_rows
from outgrow.streaming.store import Progress
from outgrow.streaming.tokenizer import TextTokenizer, train
from outgrow.streaming.verify import stored_facts, stored_index_facts, verify


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some text files with an empty one among them, and JSON lines."""
    root = tmp_path_factory.mktemp("inputs")
    prose = write_texts(root / "prose", 40)
    (prose / "empty.txt").touch()
    (root / "notes").mkdir()
    lines = [json.dumps({"text": text(100 + number, 30), "number": number}) for number in range(50)]
    (root / "notes" / "n.jsonl").write_text("\n".join([*lines, "not JSON"]))
    return {"prose": prose, "notes": root / "notes"}


def recipe_of(**data: Any) -> Recipe:
    notes = {"name": "notes", "source": {"kind": "jsonl", "path": "notes", "on_error": "skip"}}
    return make_recipe(text_stream(), notes, **data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> Site:
    """A site where the dataset of ``recipe_of()`` is built."""
    made = make_site(tmp_path_factory.mktemp("built"), **inputs)
    assert build(recipe_of(), made).built
    return made


def stored(site: Site, key: str) -> Path:
    return Path(site.open_storage().path(key))


def datasets(site: Site) -> list[str]:
    """What lies beside the cards: datasets, and what builds have left."""
    return [name for name in site.open_storage().names("datasets") if name != "by-recipe"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # LocalDataset leaves its index open
def test_mosaicmls_own_dataset_reads_every_document(site: Site, inputs: dict[str, Path]) -> None:
    from streaming.base import LocalDataset  # noqa: TID251

    from outgrow.streaming import _mosaic  # noqa: F401  (makes their package importable)

    card = find(recipe_of(), site)
    assert card is not None
    tokenizer = TextTokenizer(stored(site, card.store) / "tokenizer")
    expected = {path.name: path.read_text() for path in inputs["prose"].iterdir() if path.stat().st_size}
    found: dict[str, str] = {}
    sides: dict[str, bool] = {}
    for split in ("train", "validation"):
        for sample in LocalDataset(str(stored(site, card.store) / "streams" / "prose" / split)):
            tokens = sample["tokens"]
            assert tokens.dtype == np.uint16 and tokens[-1] == tokenizer.eos_token_id and 0 not in tokens[:-1]
            assert (sample["weights"], sample["spans"], sample["meta"]) == (b"", b"", "{}")
            found[sample["source"]] = tokenizer.decode(tokens[:-1].astype(np.int64))
            sides[sample["source"]] = split == "validation"
    assert found == expected
    for name, side in sides.items():
        assert side == (int(hashlib.sha256(expected[name].encode()).hexdigest()[:16], 16) < 0.2 * 2**64)
    assert 0 < sum(sides.values()) < 20


def test_the_card_counts_what_is_there(site: Site) -> None:
    card = find(recipe_of(), site)
    assert card is not None
    notes, prose = card.streams
    assert (notes.name, notes.documents + notes.validation_documents, notes.dropped) == ("notes", 50, {"malformed": 1})
    assert (prose.name, prose.documents + prose.validation_documents, prose.dropped) == ("prose", 40, {"empty": 1})
    assert card.tokens == notes.tokens + prose.tokens
    assert card.rows == notes.rows + prose.rows
    assert card.fill == card.tokens / (card.rows * 16)
    assert card.bytes == sum(path.stat().st_size for path in stored(site, card.store).rglob("*") if path.is_file())
    facts = stored_facts(site.open_storage(), card)
    assert [stream.dropped for stream in facts.streams] == [{"malformed": 1}, {"empty": 1}]
    shown = describe(card, facts, stored_index_facts(site.open_storage(), card))
    assert f"{card.tokens:,} tokens in {card.rows:,} rows of 16, {card.fill:.2%} full" in shown
    assert "of the cuts between rows spare sentences and turns" in shown
    assert "dropped in notes: 1 malformed" in shown
    (left_out,) = lines_of(stored(site, card.store) / "streams/notes/dropped.jsonl")
    assert (left_out["source"], left_out["reason"], left_out["content"]) == ("n.jsonl#51", "malformed", "")


def test_rows_are_shown_as_text_with_their_boundaries(site: Site, inputs: dict[str, Path]) -> None:
    recipe = recipe_of()
    card = find(recipe, site)
    assert card is not None
    shown = list(first_rows(recipe, site, card, card.rows))
    assert sorted(row.row_id for row in shown) == list(range(card.rows))
    by_source: dict[str, dict[int, str]] = {}
    for row in shown:
        for segment in row.segments:
            by_source.setdefault(segment.source, {})[segment.start] = segment.text
    whole = {source: "".join(part for _, part in sorted(parts.items())) for source, parts in by_source.items()}
    assert whole["001.txt"] == (inputs["prose"] / "001.txt").read_text() + "<|endoftext|>"
    assert whole["n.jsonl#3"] == text(102, 30) + "<|endoftext|>"


# --- the same bytes, once ---------------------------------------------------------------------------------------------


def test_the_same_bytes_for_one_and_four_processes_and_another_folder(
    tmp_path: Path, site: Site, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {name: shutil.copytree(path, tmp_path / "moved" / name) for name, path in inputs.items()}
    other = make_site(tmp_path, build_processes=4, **moved)
    # Little text makes one unit, and one unit one process.
    monkeypatch.setattr("outgrow.streaming.build.UNIT_BYTES", 1000)
    for module in ("lines", "reading"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.UNIT_BYTES", 3000)
    result = build(recipe_of(), other)
    assert result.built
    assert result.card == find(recipe_of(), site)
    assert tree_digests(stored(other, result.card.store)) == tree_digests(stored(site, result.card.store))


def test_a_second_build_does_nothing_and_says_so(site: Site) -> None:
    before = tree_digests(stored(site, ""))
    result = build(recipe_of(), site)
    assert not result.built
    assert "nothing to do" in result.note
    assert result.card == find(recipe_of(), site)
    assert tree_digests(stored(site, "")) == before


def test_another_length_or_seed_is_another_index_of_the_same_store(tmp_path: Path, inputs: dict[str, Path]) -> None:
    site = make_site(tmp_path, **inputs)
    first = build(recipe_of(), site)
    longer = build(recipe_of(sequence_length=32), site)
    reader = build(recipe_of(loader_workers=7), site)
    assert (longer.card.store, longer.built) == (first.card.store, True)
    assert "indexed" in longer.note
    assert longer.card.indexes != first.card.indexes
    assert (reader.card, reader.built) == (first.card, False)
    assert datasets(site) == [first.card.store.removeprefix("datasets/")]


@pytest.mark.parametrize(
    ("keys", "stream_keys"),
    [
        ({}, {"filter": {"min_chars": 470}}),
        ({}, {"order": "sequential"}),
        ({}, {"split": "never", "too_long": "split"}),
        ({"duplicates": {"remove": "exact"}}, {}),
        ({"window_shards": 3}, {}),
    ],
)
def test_what_decides_the_rows_alone_makes_another_index_of_the_same_store(
    tmp_path: Path, inputs: dict[str, Path], keys: dict[str, Any], stream_keys: dict[str, Any]
) -> None:
    site = make_site(tmp_path, **inputs)
    first = build(make_recipe(text_stream()), site)
    other = build(make_recipe(text_stream() | stream_keys, **keys), site)
    assert other.built and "indexed anew" in other.note
    assert other.card.store == first.card.store and other.card.indexes[0].folder != first.card.indexes[0].folder


def test_another_mix_of_streams_is_the_same_dataset(tmp_path: Path, inputs: dict[str, Path]) -> None:
    site = make_site(tmp_path, **inputs)
    notes = {"name": "notes", "source": {"kind": "jsonl", "path": "notes", "on_error": "skip"}}
    first = build(make_recipe(text_stream(), notes), site)
    mixed = build(make_recipe(text_stream() | {"epochs": 3}, notes | {"share": 0.1}), site)
    assert (mixed.card, mixed.built) == (first.card, False)
    away = make_site(tmp_path, prose=tmp_path / "gone", notes=tmp_path / "gone")
    assert find(make_recipe(text_stream() | {"epochs": 2}, notes), away) == first.card


def test_stages_of_several_lengths_have_an_index_each(tmp_path: Path, inputs: dict[str, Path]) -> None:
    stages = [{"tokens": 64, "shares": {"prose": 1}, "sequence_length": 32}, {"shares": {"prose": 1}}]
    recipe = make_recipe(text_stream(), stages=stages)
    url = f"memory://stages-{os.getpid()}"
    site = make_site(tmp_path, storage=url, **inputs)
    card = build(recipe, site).card
    assert [index.sequence_length for index in card.indexes] == [16, 32]
    assert [index.streams[0].tokens for index in card.indexes] == [card.tokens] * 2
    by_length = {index.sequence_length: index for index in card.indexes}
    assert by_length[32].rows * 2 <= by_length[16].rows + 2
    for index in card.indexes:
        assert site.open_storage().exists(f"{index.folder}/COMMITTED")
    assert verify(site.open_storage(), card).files > 0
    # One of them is there already for another recipe.
    single = build(make_recipe(text_stream()), site)
    assert single.card.indexes == card.indexes[:1] and single.card.store == card.store


@pytest.mark.parametrize(
    "change",
    ["content", "name", "fraction", "tokenizer", "shard_bytes", "clean", "tag", "chat", "languages", "near", "on_error"],
)
def test_what_decides_the_bytes_makes_another_store(tmp_path: Path, inputs: dict[str, Path], change: str) -> None:
    prose = shutil.copytree(inputs["prose"], tmp_path / "prose")
    site = make_site(tmp_path, prose=prose)
    before = build(make_recipe(text_stream()), site).card
    sections: Mapping[str, Any] = {
        "fraction": {"validation_fraction": 0.3},
        "tokenizer": {"tokenizer": {"kind": "train", "vocab_size": 301, "sample_bytes": 100_000}},
        "shard_bytes": {"shard_bytes": 70_000},
        "near": {"duplicates": {"remove": "near"}},
    }
    streams: Mapping[str, Any] = {
        "clean": {"clean": [{"kind": "nfc"}]},
        "tag": {"tag": "<PROSE>"},
        "chat": {"chat": {"add_system": "You are kind."}},
        "languages": {"filter": {"languages": ["en"]}},
        "on_error": {"source": text_stream()["source"] | {"on_error": "skip"}},
    }
    if change == "content":
        (prose / "001.txt").write_text(text(999, 60))
    if change == "name":
        (prose / "001.txt").rename(prose / "zzz.txt")
    recipe = make_recipe(text_stream() | streams.get(change, {}), **sections.get(change, {}))
    assert find(recipe, site) is None
    if change == "languages":
        (prose / "en.txt").write_text("The population of the capital grows from year to year, says the mayor. " * 9)
    after = build(recipe, site).card
    assert after.store_fingerprint != before.store_fingerprint
    tables = [load_file(path) for path in stored(site, after.store).glob("streams/prose/*/documents/*")]
    assert all(("language" in table, "signature" in table) == (change == "languages", change == "near") for table in tables)
    assert after.vocab_size == {"tokenizer": 301, "tag": 301}.get(change, 300)


def test_dialogues_and_pairs_become_documents_with_weights(tmp_path: Path) -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    talks = [{"messages": [said("user", text(n, 9)), said("assistant", text(90 + n, 9))]} for n in range(30)]
    pairs = [{"prompt": text(n, 5), "chosen": text(50 + n, 5), "rejected": text(70 + n, 7)} for n in range(30)]
    for name, records in (("talks", talks), ("pairs", pairs)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(record) for record in records]
        (tmp_path / name / "x.jsonl").write_text("\n".join([*lines, '{"messages": 3}']))
    chat = {"template": {"kind": "named", "name": "chatml"}}
    streams = [
        {
            "name": name,
            "source": {"kind": "jsonl", "path": name, "on_error": "quarantine", "shape": {"kind": shape}},
            "chat": chat,
            "split": "never",
        }
        for name, shape in (("talks", "messages"), ("pairs", "preference"))
    ]
    site = make_site(tmp_path, talks=tmp_path / "talks", pairs=tmp_path / "pairs")
    recipe = make_recipe(*streams, sequence_length=512, validation_fraction=0.0)
    card = build(recipe, site).card
    paired, talked = stored_facts(site.open_storage(), card).streams
    assert (paired.name, paired.pairs, paired.documents, paired.dropped) == ("pairs", True, 30, {"malformed": 1})
    assert (talked.name, talked.pairs, talked.documents, talked.dropped) == ("talks", False, 30, {"malformed": 1})
    (table,) = (load_file(path) for path in stored(site, card.store).glob("streams/talks/train/documents/*"))
    assert not table["uniform"].any() and (table["weight"] > 0).all() and (table["weight"] < table["lengths"] - 1).all()
    (lost,) = lines_of(stored(site, card.store) / "streams/talks/dropped.jsonl")
    assert (lost["source"], lost["reason"], lost["content"]) == ("x.jsonl#31", "malformed", '{"messages": 3}')


def test_a_machine_without_the_sources_uses_the_dataset_of_the_same_section(tmp_path: Path, inputs: dict[str, Path]) -> None:
    prose = shutil.copytree(inputs["prose"], tmp_path / "prose")
    site = make_site(tmp_path, prose=prose)
    card = build(make_recipe(text_stream()), site).card
    shutil.rmtree(prose)
    result = build(make_recipe(text_stream()), site)
    assert (result.card, result.built) == (card, False)
    assert "not on this machine" in result.note and card.store in result.note
    assert find(make_recipe(text_stream()), site) == card
    with pytest.raises(DataError, match=f"there is no file or folder {prose}"):
        build(make_recipe(text_stream(), sequence_length=64), site)


def test_equal_sections_over_different_folders_do_not_shadow_each_other(tmp_path: Path, inputs: dict[str, Path]) -> None:
    other = write_texts(tmp_path / "other", 12)
    recipe = make_recipe(text_stream())
    here, there = make_site(tmp_path, prose=inputs["prose"]), make_site(tmp_path, prose=other)
    first, second = build(recipe, here), build(recipe, there)
    assert first.built and second.built and first.card.store != second.card.store
    for site, card in ((here, first.card), (there, second.card), (here, first.card)):
        assert find(recipe, site) == card
        again = build(recipe, site)
        assert (again.card, again.built) == (card, False)
        assert "nothing to do" in again.note
    # Also where the cards were lost, and so all that is left to do is to write them again.
    shutil.rmtree(stored(here, "datasets/by-recipe"))
    again = build(recipe, here)
    assert (again.card, again.built) == (first.card, False)
    assert "nothing to do" in again.note


def test_a_bucket_gets_the_dataset_whole_with_its_markers_last(tmp_path: Path, inputs: dict[str, Path]) -> None:
    url = f"memory://build-{os.getpid()}"
    site = make_site(tmp_path, storage=url, **inputs)
    seen: list[Progress] = []
    card = build(recipe_of(), site, progress=seen.append).card
    assert {progress.stage for progress in seen} == {"inputs", "tokenizer", "tokens", "selection", "index", "upload"}
    storage = site.open_storage()
    assert verify(storage, card).num_bytes > 10_000
    assert find(recipe_of(), site) == card
    assert not build(recipe_of(), site).built
    # A machine that lacks store and cache builds nothing either: the bucket has it.
    assert not build(recipe_of(), make_site(tmp_path / "elsewhere", storage=url, **inputs)).built
    storage.remove(f"{card.store}/COMMITTED")
    assert find(recipe_of(), site) is None


# --- what is refused, and what a failure leaves -----------------------------------------------------------------------


def test_verify_names_every_file_that_differs_or_is_missing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    site = make_site(tmp_path, **inputs)
    card = build(recipe_of(), site).card
    verified = verify(site.open_storage(), card)
    every = [path for path in stored(site, card.store).rglob("*") if path.is_file()]
    assert verified.files == len(every) - 4, "all but the two manifests and markers"
    shard = stored(site, card.store) / "streams/prose/train/shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    (stored(site, card.store) / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        verify(site.open_storage(), card)
    assert "prose/train/shard.00000.mds: the bytes differ" in str(caught.value)
    assert "tokenizer_config.json: the file is missing" in str(caught.value)
    manifest = stored(site, card.store) / "store.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format": 2', b'"format": 3'))
    with pytest.raises(IntegrityError, match="store.json"):
        verify(site.open_storage(), card)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = write_texts(tmp_path / "prose", 10)
    (prose / "zz.txt").write_bytes(b"\xff\xfe\xff")
    monkeypatch.setattr("outgrow.streaming.build.UNIT_BYTES", 100)
    site = make_site(tmp_path, build_processes=processes, prose=prose)
    train([text(number, 100) for number in range(5)], 300, tmp_path / "tokenizer")
    recipe = make_recipe(text_stream(), tokenizer={"kind": "folder", "path": "tokenizer"})
    site = site.model_copy(update={"sources": {**site.sources, "tokenizer": str(tmp_path / "tokenizer")}})
    # The forecast reads the first files only, so the bad one is met in the midst of the build.
    monkeypatch.setattr("outgrow.streaming.sampling._FORECAST_BYTES", 10)
    monkeypatch.setattr("outgrow.streaming.sources.reading.UNIT_BYTES", 10)
    with pytest.raises(DataError, match="zz.txt"):
        build(recipe, site)
    assert datasets(site) == []


def test_a_disk_without_room_is_refused_with_figures_before_a_shard_is_written(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path, **inputs)
    monkeypatch.setattr("outgrow.storage.Storage.free_bytes", lambda self: 5_000)
    with pytest.raises(DataError, match=r"takes about 0.00 GB, and 0.00 GB are free"):
        build(recipe_of(), site)
    assert datasets(site) == []


def test_a_stream_with_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text("")
    train([text(number, 100) for number in range(5)], 300, tmp_path / "tokenizer")
    site = make_site(tmp_path, prose=tmp_path / "prose", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(DataError, match="stream 'prose' holds no document"):
        build(make_recipe(text_stream(), tokenizer={"kind": "folder", "path": "tokenizer"}), site)


def test_token_ids_need_the_tokenizer_that_made_them(tmp_path: Path) -> None:
    from outgrow.streaming._mosaic import MDSWriter

    with MDSWriter(columns={"tokens": "ndarray"}, out=str(tmp_path / "ids")) as writer:
        for number in range(20):
            writer.write({"tokens": np.array([number + 5, 6, 7], np.int32)})
        writer.write({"tokens": np.array([310, 6, 0], np.int32)})
    made = train([text(number, 100) for number in range(5)], 300, tmp_path / "tokenizer")
    site = make_site(tmp_path, ids=tmp_path / "ids", tokenizer=tmp_path / "tokenizer")
    stream = {"name": "ids", "source": {"kind": "mds", "path": "ids"}}
    with pytest.raises(DataError, match="trained on text"):
        build(make_recipe(stream), site)
    folder = {"kind": "folder", "path": "tokenizer"}
    with pytest.raises(DataError, match="token ids from 0 to 310 are not of this tokenizer"):
        build(make_recipe(stream, tokenizer=folder), site)
    larger = train([text(number, 300) for number in range(9)], 320, tmp_path / "larger")
    site = make_site(tmp_path, ids=tmp_path / "ids", tokenizer=tmp_path / "larger")
    card = build(make_recipe(stream, tokenizer=folder), site).card
    assert card.tokenizer_fingerprint == larger.fingerprint != made.fingerprint
    # Each document ends with the end-of-text token once: three tokens and it, or the one that was there.
    assert sum(s.tokens + s.validation_tokens for s in card.streams) == 20 * 4 + 3


def test_a_build_starts_no_thread_that_stays(tmp_path: Path, inputs: dict[str, Path]) -> None:
    before = threading.active_count()
    build(recipe_of(), make_site(tmp_path, **inputs))
    assert threading.active_count() == before


def test_a_card_goes_through_json(site: Site) -> None:
    card = find(recipe_of(), site)
    assert card is not None
    assert type(card).from_dict(json.loads(json.dumps(dataclasses.asdict(card)))) == card


def test_what_the_system_refuses_is_said_in_one_line(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (tmp_path / "storage").write_text("a file where the folder of datasets would be")
    with pytest.raises(DataError, match="storage.*: the dataset cannot be built: "):
        build(recipe_of(), make_site(tmp_path, **inputs))


def test_a_stream_too_small_for_validation_is_told(tmp_path: Path, inputs: dict[str, Path]) -> None:
    result = build(recipe_of(validation_fraction=0.0001), make_site(tmp_path, **inputs))
    assert result.card.validation_rows == 0
    assert "too few documents to hold one out for validation: notes, prose" in result.note
