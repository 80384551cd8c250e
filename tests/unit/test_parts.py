"""Streams written in parts: where parts end, and the same bytes however often the writing was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from token_stores import VOCAB, documents, pair, stored

from outgrow.errors import IntegrityError
from outgrow.storage import tree_digests
from outgrow.streaming import parts
from outgrow.streaming.document_table import DocumentTable, read_tables
from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.parts import PartCut, StoreForm, StreamParts
from outgrow.streaming.shards import ShardTable, every_file
from outgrow.streaming.sources.document import Dropped, Input
from outgrow.streaming.store import finish_stream
from outgrow.streaming.token_block import StoredDocument, TokenBlock, choose, join, make_block

FORM = StoreForm(vocab_size=VOCAB, compression="none", shard_bytes=2000)
LIMIT = 100


def given(*sizes: int) -> list[Input]:
    return [Input(name=str(n), digest="", num_bytes=size, text_bytes=size) for n, size in enumerate(sizes)]


def ends(monkeypatch: pytest.MonkeyPatch, inputs: list[Input], units: list[int], documents: int = 1) -> list[int]:
    """The units that end a part of at least ``LIMIT`` bytes."""
    monkeypatch.setattr(parts, "PART_BYTES", LIMIT)
    monkeypatch.setattr(parts, "_SHARDS_A_PART", 0)
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 8)
    cut, done, part, count, found = PartCut(inputs, FORM), 0, 0, 0, []
    resumed = PartCut(inputs, FORM)
    for number, size in enumerate(units):
        done, part, count = done + size, part + size, count + documents
        full = cut.is_full(part_bytes=part, part_documents=count, stream_bytes=done)
        assert resumed.is_full(part_bytes=part, part_documents=count, stream_bytes=done) == full
        if full:
            found.append(number)
            part = count = 0
            resumed = PartCut(inputs, FORM)  # as of a build that was interrupted here
    return found


def test_a_part_ends_where_an_input_ends_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, given(60, 60, 60, 60), [60, 60, 60, 60]) == [1, 3]
    # Units of 40; the input ends after 160: that is past the limit and before twice the limit.
    assert ends(monkeypatch, given(160, 1000), [40] * 10) == [3, 8]


def test_a_part_of_a_long_input_ends_at_twice_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, given(1000), [50] * 20) == [3, 7, 11, 15, 19]


def test_a_part_of_many_documents_ends_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, given(1000), [10] * 12, documents=3) == [2, 5, 8, 11]


def test_parts_grow_with_what_there_is_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_MOST_PARTS", 4)
    assert ends(monkeypatch, given(4000), [100] * 40, documents=0) == [19, 39]


# --- writing ----------------------------------------------------------------------------------------------------------


def blocks() -> list[TokenBlock]:
    """Twelve blocks: documents of both splits, weighted ones, pairs, borders, dropped ones, and a block of nothing."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(12):
        own: list[StoredDocument] = []
        for place, (tokens, weights) in enumerate(documents(number, 0 if number == 5 else 7, weighted=True)):
            borders = np.unique(rng.integers(1, len(tokens) + 1, 3)).astype(np.int32)
            source = f"{number}#{place}"
            own.append(stored(tokens, weights=weights, borders=borders, source=source, validation=place % 4 == 3))
        if number % 3 == 0:
            own.append(pair(number, prompt=3, chosen=4, rejected=5, source=f"pair{number}"))
        lost = [Dropped(source=f"bad{number}", reason="malformed", detail="Ж", content="x\ny")] if number % 2 else []
        made.append(make_block(own, stream=0, num_bytes=10, dropped=lost, cleaned=[(1, number), (0, 0)]))
    return made


def interrupted(given: list[TokenBlock], after: int) -> Iterator[TokenBlock]:
    yield from given[:after]
    raise KeyboardInterrupt


def write(building: Path, *, stops: list[int], form: StoreForm = FORM) -> StreamParts:
    """Write all blocks, interrupted at first after so many blocks, then after so many more, and so on."""
    for stop in stops:
        stream = StreamParts(building, "books", form)
        with pytest.raises(KeyboardInterrupt):
            stream.write(interrupted(blocks()[stream.totals.units :], stop), ())
        # What a process that is killed leaves, beside what it counts.
        stream = StreamParts(building, "books", form)
        for split in parts.SPLITS:
            (stream.folder / split / "documents").mkdir(parents=True, exist_ok=True)
            (stream.folder / split / f"shard.{stream.totals.shards[split]:05}.mds").write_bytes(b"half")
            (stream.folder / split / "documents" / "00099.safetensors").write_bytes(b"half")
        with open(stream.folder / "dropped.jsonl", "ab") as file:
            file.write(b'{"half')
        (building / "parts" / "books").mkdir(parents=True, exist_ok=True)
        (building / "parts" / "books" / ".00099.json.1.2.tmp").write_text('{"half')
    stream = StreamParts(building, "books", form)
    stream.write(iter(blocks()[stream.totals.units :]), ())
    assert stream.is_complete
    finish_stream(building / "store", stream)
    return stream


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 20)


@pytest.mark.parametrize("stops", [[0], [1], [4], [2, 3, 0, 5], [11], [12]])
def test_the_same_bytes_however_often_it_was_interrupted(tmp_path: Path, small_parts: None, stops: list[int]) -> None:
    straight = write(tmp_path / "straight", stops=[])
    other = write(tmp_path / "other", stops=stops)
    assert sum(1 for _ in straight.finished()) == 4
    assert other.totals == straight.totals
    assert tree_digests(other.folder) == tree_digests(straight.folder)


def test_a_finished_part_is_not_written_again(tmp_path: Path, small_parts: None) -> None:
    stream = StreamParts(tmp_path, "books", FORM)
    with pytest.raises(KeyboardInterrupt):
        stream.write(interrupted(blocks(), 8), ())
    before = {path: path.stat().st_mtime_ns for path in stream.folder.rglob("*.mds")}
    again = StreamParts(tmp_path, "books", FORM)
    assert again.totals.units == 7 and before
    again.write(iter(blocks()[7:]), ())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_written_can_be_read_back(tmp_path: Path, small_parts: None) -> None:
    stream = write(tmp_path, stops=[3])
    digests = {f"streams/books/{name}": value for name, value in tree_digests(stream.folder).items() if "shard." not in name}
    for split in parts.SPLITS:
        expected = [s for block in blocks() for s in block.samples() if s.validation == (split == "validation")]
        tables = list(read_tables(tmp_path / "store", "books", split, digests))
        table = join(tables, languages=False, signatures=False)
        shards = ShardTable.parse((stream.folder / split / "shards.safetensors").read_bytes())
        folder = MdsFolder(stream.folder / split)
        assert len(table) == len(folder) == len(expected) == int(shards.samples.sum()) == stream.totals.documents[split]
        assert int(table.lengths.sum()) == stream.totals.tokens[split]
        assert np.array_equal(np.bincount(table.shard, minlength=len(shards)), shards.samples)
        for number, sample in enumerate(expected):
            assert np.array_equal(folder.column(number, "tokens"), sample.tokens)
            assert folder.column(number, "source") == sample.source
            assert folder.column(number, "weights") == (b"" if sample.weights is None else sample.weights.tobytes())
            assert folder.column(number, "spans") == (b"" if sample.spans is None else sample.spans.tobytes())
            assert table.uniform[number] == (sample.weights is None)
    lines = [json.loads(line) for line in (stream.folder / "dropped.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"bad{n}" for n in range(1, 12, 2)]
    assert lines[0] == {"source": "bad1", "reason": "malformed", "detail": "Ж", "content": "x\ny"}
    assert stream.totals.dropped == {"malformed": 6} and stream.totals.pairs == 4
    assert stream.totals.cleaned == ((12, sum(range(12))), (0, 0))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_file_is_vouched_for(tmp_path: Path, small_parts: None, compression: Literal["none", "zstd"]) -> None:
    stream = write(tmp_path, stops=[], form=StoreForm(vocab_size=VOCAB, compression=compression, shard_bytes=2000))
    every = tree_digests(stream.folder)
    in_manifest = {name: value for name, value in every.items() if "/shard." not in name}
    assert len(every) > len(in_manifest)
    assert dict(every_file(in_manifest, lambda name: (stream.folder / name).read_bytes())) == every
    for split in parts.SPLITS:
        table = ShardTable.parse((stream.folder / split / "shards.safetensors").read_bytes())
        sizes = [table.stored_bytes(number) for number in range(len(table))]
        assert sizes == [(stream.folder / split / table.name(number)).stat().st_size for number in range(len(table))]
        assert table.num_bytes == sum(sizes)
    (stream.folder / "train" / "shards.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match="train/shards.safetensors"):
        list(every_file(in_manifest, lambda name: (stream.folder / name).read_bytes()))


# --- tables -----------------------------------------------------------------------------------------------------------


def table() -> DocumentTable:
    return join([block.table for block in blocks()], languages=False, signatures=False)


def test_columns_are_those_of_each_document() -> None:
    made, samples, pairs = table(), [s for block in blocks() for s in block.samples()], 0
    for number, sample in enumerate(samples):
        spans = [(0, len(sample.tokens))] if sample.spans is None else sample.spans.tolist()
        weights = np.ones(len(sample.tokens)) if sample.weights is None else sample.weights.astype(np.float64)
        expected = sum(float(weights[place]) for start, stop in spans for place in range(start + 1, stop))
        assert made.weight[number] == pytest.approx(expected, rel=1e-12)
        pairs += sample.spans is not None
    assert pairs == 4


def test_choosing_documents_takes_their_borders_along() -> None:
    whole = table()
    chosen = np.random.default_rng(1).random(len(whole)) < 0.5
    some = choose(whole, chosen)
    split = np.split(whole.borders, np.cumsum(whole.border_counts)[:-1])
    assert [b.tolist() for b in np.split(some.borders, np.cumsum(some.border_counts)[:-1])] == [
        own.tolist() for own, take in zip(split, chosen, strict=True) if take
    ]
    assert np.array_equal(some.lengths, whole.lengths[chosen])


def test_columns_that_were_asked_for_are_there_even_without_a_document() -> None:
    empty = join([make_block([], stream=0, num_bytes=0).table], languages=True, signatures=True)
    assert len(empty) == 0
    assert empty.language is not None and empty.language.shape == (0, 2)
    assert empty.signature is not None and empty.signature.shape == (0, 128)
    tokens = np.array([1, 2])
    full = make_block(
        [stored(tokens, language=code, signature=np.full(128, n, np.uint32)) for n, code in enumerate(("ru", "", "en"))],
        stream=0,
        num_bytes=0,
    )
    both = join([empty, full.table], languages=True, signatures=True)
    assert both.language is not None and both.language.tobytes() == b"ru\0\0en"
    assert both.signature is not None and both.signature[:, 5].tolist() == [0, 1, 2]
