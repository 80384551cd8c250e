"""The row index against a slow and obvious twin: no token lost or doubled, windows kept, weights exact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_stores import Dataset, documents, make_dataset

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest
from outgrow.streaming.documents import Documents
from outgrow.streaming.manifest import FILES, commit, read_manifest
from outgrow.streaming.packing import pack
from outgrow.streaming.rows import IndexFacts, RowIndex, Split, StreamRows, build_index
from outgrow.streaming.shuffle import permutation


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two streams; documents shorter and longer than a row, some with loss weights, one stream without validation."""
    streams = {
        "books": (documents(1, 200, longest=100, weighted=True), documents(2, 23, weighted=True)),
        "code": (documents(3, 61, longest=9), []),
    }
    return make_dataset(tmp_path_factory.mktemp("rows"), streams)


def source(dataset: Dataset, name: str, split: Split) -> Documents:
    return Documents(dataset.store, name, split, read_manifest(dataset.store, "store.json")[FILES], open_shards=4)


def test_of_two_builds_of_one_index_the_second_takes_the_firsts(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {"sequence_length": 8, "window_shards": 2, "seed": 1}
    first: list[IndexFacts] = []

    def commit_late(folder: Path, name: str, facts: dict[str, Any]) -> None:
        commit(folder, name, facts)
        monkeypatch.setattr("outgrow.streaming.rows.commit", commit)
        monkeypatch.setattr("outgrow.streaming.aside._PREFIX", ".building-other-")  # as of another process
        first.append(build_index(dataset.store, tmp_path / "rows", **choices))

    monkeypatch.setattr("outgrow.streaming.rows.commit", commit_late)
    assert build_index(dataset.store, tmp_path / "rows", **choices) == first[0]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def shard_of_documents(dataset: Dataset, name: str, split: Split) -> list[int]:
    shards = json.loads((dataset.store / "streams" / name / split / "index.json").read_bytes())["shards"]
    return [number for number, shard in enumerate(shards) for _ in range(shard["samples"])]


def twin(dataset: Dataset, stream: StreamRows, split: Split) -> list[list[tuple[int, int]]]:
    """Rows as lists of (document, place in the document), token by token."""
    docs = dataset.streams[stream.name][0 if split == "train" else 1]
    laid_out = [(document, place) for document in stream.order.tolist() for place in range(len(docs[document][0]))]
    length = stream.sequence_length
    return [laid_out[at : at + length] for at in range(0, len(laid_out), length)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_spans_are_the_documents_laid_end_to_end_and_cut(dataset: Dataset, split: Split) -> None:
    index = RowIndex.open(dataset.index)
    for stream in index.streams(split):
        expected = twin(dataset, stream, split)
        assert stream.num_rows == len(expected)
        for row, tokens in enumerate(expected):
            spans = stream.spans(row)
            assert [(s.document, s.start + i) for s in spans for i in range(s.length)] == tokens
            assert all(span.length > 0 for span in spans)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_token_is_in_exactly_one_row_and_every_target_is_predicted_once(dataset: Dataset, split: Split) -> None:
    index = RowIndex.open(dataset.index)
    sources = [source(dataset, stream.name, split) for stream in index.streams(split)]
    num_rows = int(index.first_rows(split)[-1])
    packed = pack(range(num_rows), index.streams(split), index.first_rows(split), sources, fill_token=0)
    docs = [doc for stream in index.streams(split) for doc in dataset.streams[stream.name][0 if split == "train" else 1]]

    inside = packed.segments >= 0
    assert Counter(packed.token_ids[inside].tolist()) == Counter(token for tokens, _ in docs for token in tokens.tolist())
    predicted = packed.targets != -100
    assert Counter(packed.targets[predicted].tolist()) == Counter(t for tokens, _ in docs for t in tokens[1:].tolist())
    assert not np.any(packed.weights[~predicted])
    np.testing.assert_array_equal(packed.row_ids, np.arange(num_rows))
    np.testing.assert_allclose(index.weights(split), packed.weights.sum(axis=1, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(index.tokens(split), inside.sum(axis=1))


def test_packed_rows_are_those_of_a_token_by_token_twin(dataset: Dataset) -> None:
    index = RowIndex.open(dataset.index)
    for stream in index.train:
        docs = dataset.streams[stream.name][0]
        own = source(dataset, stream.name, "train")
        packed = pack(range(stream.num_rows), [stream], np.array([0, stream.num_rows]), [own], fill_token=9)
        for row, places in enumerate(twin(dataset, stream, "train")):
            segment, position, before = -1, 0, -1
            for at, (document, place) in enumerate(places):
                tokens, weights = docs[document]
                segment, position = (segment, position + 1) if document == before else (segment + 1, 0)
                before = document
                last = place == len(tokens) - 1
                assert packed.token_ids[row, at] == tokens[place]
                assert packed.targets[row, at] == (-100 if last else tokens[place + 1])
                assert packed.weights[row, at] == np.float32(0 if last else 1 if weights is None else weights[place + 1])
                assert (packed.segments[row, at], packed.positions[row, at]) == (segment, position)
            padding = slice(len(places), None)
            assert (packed.token_ids[row, padding] == 9).all()
            assert (packed.segments[row, padding] == -1).all()
            assert (packed.targets[row, padding] == -100).all()


def test_documents_stay_in_their_window_and_windows_begin_where_told(dataset: Dataset) -> None:
    index = RowIndex.open(dataset.index)
    for split in ("train", "validation"):
        for stream in index.streams(split):
            window = np.array(shard_of_documents(dataset, stream.name, split), np.int64) // 2
            assert np.array_equal(window[stream.order], np.sort(window))
            assert sorted(stream.order.tolist()) == list(range(len(window)))
            first_window = [int(window[stream.spans(row)[0].document]) for row in range(stream.num_rows)]
            counts = np.diff(stream.window_rows)
            assert first_window == [number for number, count in enumerate(counts) for _ in range(count)]
    assert len(index.train[0].window_rows) > 4, "the test needs several windows"
    assert not np.array_equal(index.train[0].order, np.sort(index.train[0].order)), "documents are shuffled"


def test_same_inputs_give_the_same_bytes_and_another_seed_length_or_window_another_index(
    dataset: Dataset, tmp_path: Path
) -> None:
    def build(name: str, *, sequence_length: int = 32, window_shards: int = 2, seed: int = 5) -> str:
        out = tmp_path / name
        build_index(dataset.store, out, sequence_length=sequence_length, window_shards=window_shards, seed=seed)
        return digest((out / "index.json").read_bytes())

    assert build("again") == digest((dataset.index / "index.json").read_bytes())
    others = {build("seed", seed=6), build("length", sequence_length=33), build("window", window_shards=3)}
    assert len(others | {build("again")}) == 4
    assert not list(tmp_path.glob(".building*"))


def test_an_index_that_is_there_is_only_opened(dataset: Dataset) -> None:
    before = (dataset.index / "index.json").stat().st_mtime_ns
    facts = build_index(dataset.store, dataset.index, sequence_length=32, window_shards=2, seed=5)
    assert facts.fingerprint == dataset.card.index_fingerprint
    assert (dataset.index / "index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["index.json", "books.train.safetensors", "code.validation.safetensors"])
def test_a_flipped_byte_in_the_index_is_refused(dataset: Dataset, tmp_path: Path, file: str) -> None:
    out = tmp_path / "rows"
    build_index(dataset.store, out, sequence_length=32, window_shards=2, seed=5)
    data = bytearray((out / file).read_bytes())
    data[len(data) // 2] ^= 1
    (out / file).write_bytes(data)
    with pytest.raises(IntegrityError, match=file.replace(".", r"\.")):
        RowIndex.open(out)


def test_an_index_that_was_never_finished_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    build_index(dataset.store, tmp_path / "rows", sequence_length=32, window_shards=2, seed=5)
    (tmp_path / "rows/COMMITTED").unlink()
    with pytest.raises(DataError, match="never finished"):
        RowIndex.open(tmp_path / "rows")


def test_orders_never_change() -> None:
    """A checkpoint taken today goes on with the same rows after every upgrade."""
    assert permutation(10, "rows", 7, "books", 0).tolist() == [2, 3, 8, 1, 6, 9, 0, 5, 7, 4]
