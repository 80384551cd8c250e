"""The row index against slow and obvious twins: no token lost or doubled, documents whole or in order as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lengths
import numpy as np
import pytest
from table_stores import keep_all, table_of, write_table_store
from token_stores import Dataset, data_of, documents, make_dataset, pair, stored, write_store

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest
from outgrow.streaming.bin_packing import lower_bound
from outgrow.streaming.documents import Documents
from outgrow.streaming.manifest import FILES, commit, read_manifest
from outgrow.streaming.packing import PackedRows, pack
from outgrow.streaming.row_building import build_index, index_fingerprint
from outgrow.streaming.row_cuts import Borders
from outgrow.streaming.row_files import read_dropped_table
from outgrow.streaming.row_windows import Window
from outgrow.streaming.rows import IndexFacts, RowIndex, StreamRows, read_facts
from outgrow.streaming.selection import DUPLICATE, TOO_LONG, TOO_SHORT, Choice, Selection, Split, select
from outgrow.streaming.shards import SHARDS, ShardTable
from outgrow.streaming.shuffle import permutation
from outgrow.streaming.token_block import StoredDocument

LENGTH = 32
OPTIONS = {
    "books": {},
    "code": {},
    "lecture": {"order": "sequential"},
    "pairs": {"split": "never"},
    "queue": {"split": "never", "too_long": "split", "order": "sequential"},
    "talk": {"split": "never", "too_long": "drop"},
    "whole": {"split": "never", "too_long": "split"},
}
"""A stream of each way of laying rows."""


def sentences(seed: int, count: int, longest: int) -> list[StoredDocument]:
    """Documents with borders, half of them with loss weights."""
    rng = np.random.default_rng(seed)
    made = []
    for number, (tokens, weights) in enumerate(documents(seed, count, longest=longest, weighted=True)):
        borders = np.flatnonzero(rng.random(len(tokens)) < 0.15).astype(np.int32)
        made.append(stored(tokens, source=f"{seed}#{number}", weights=weights, borders=borders[borders > 0]))
    return made


def pairs(seed: int, count: int) -> list[StoredDocument]:
    sizes = np.random.default_rng(seed).integers(1, 6, (count, 3)).tolist()
    made = [pair(seed + i, prompt=a, chosen=b, rejected=c, source=f"pair#{i}") for i, (a, b, c) in enumerate(sizes)]
    return [replace(own, weights=None) if i % 3 == 0 else own for i, own in enumerate(made)]  # some learned with their prompts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Documents shorter and longer than a row; windows of two shards, of which one ends in another table than it began in."""
    streams = {
        "books": (sentences(1, 200, 100), sentences(2, 23, 60)),
        "code": (documents(3, 61, longest=9), []),
        "lecture": (sentences(4, 90, 90), sentences(5, 20, 60)),
        "pairs": (pairs(6, 150), pairs(7, 20)),
        "queue": (sentences(8, 150, 70), sentences(9, 10, 60)),
        "talk": (sentences(10, 250, 40), sentences(11, 30, 40)),
        "whole": (sentences(12, 150, 100), sentences(13, 10, 60)),
    }
    return make_dataset(tmp_path_factory.mktemp("rows"), streams, options=OPTIONS, part_documents=37)


@pytest.fixture(scope="module")
def index(dataset: Dataset) -> RowIndex:
    return RowIndex.open(dataset.index)


SPLITS: tuple[Split, ...] = ("train", "validation")


def given(dataset: Dataset, name: str, split: Split) -> list[tuple[Any, Any, Any]]:
    """Tokens, weights and spans of every document of a stream, as they were handed to the store."""
    made: list[tuple[Any, Any, Any]] = []
    for document in dataset.streams[name][SPLITS.index(split)]:
        if isinstance(document, StoredDocument):
            made.append((document.tokens, document.weights, document.spans))
        else:
            made.append((*document, None))
    return made


def source(dataset: Dataset, name: str, split: Split) -> Documents:
    return Documents(dataset.store, name, split, read_manifest(dataset.store, "store.json")[FILES], open_shards=4)


def windows(stream: StreamRows) -> list[Window]:
    return [stream.window(number) for number in range(len(stream.window_rows) - 1)]


def is_dropped(dataset: Dataset, name: str, split: Split, document: int) -> bool:
    return name == "talk" and len(given(dataset, name, split)[document][0]) > LENGTH


def twin(stream: StreamRows) -> list[list[tuple[int, int]]]:
    """Rows as lists of (document, place in the document), token by token."""
    rows = []
    for window in windows(stream):
        lengths = np.diff(window.ends, prepend=0).tolist()
        starts = window.starts.tolist() or [0] * len(lengths)
        laid_out = [
            (window.first + document, start + place)
            for document, start, length in zip(window.order.tolist(), starts, lengths, strict=True)
            for place in range(length)
        ]
        rows += [laid_out[a:b] for a, b in zip(window.cuts[:-1].tolist(), window.cuts[1:].tolist(), strict=True)]
    return rows


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_token_is_in_exactly_one_row(dataset: Dataset, index: RowIndex, name: str, split: Split) -> None:
    (stream,) = [stream for stream in index.streams(split) if stream.name == name]
    rows = twin(stream)
    assert stream.num_rows == len(rows)
    every = Counter(place for row in rows for place in row)
    expected = [
        (document, place)
        for document, (tokens, _, _) in enumerate(given(dataset, name, split))
        for place in range(len(tokens))
        if not is_dropped(dataset, name, split, document)
    ]
    assert every == Counter(expected)
    for row, tokens in enumerate(rows):
        spans = stream.spans(row)
        assert [(s.document, s.start + i) for s in spans for i in range(s.length)] == tokens
        assert all(span.length > 0 for span in spans)
        assert 0 < stream.tokens(row) == len(tokens) <= LENGTH


def packed_rows(dataset: Dataset, index: RowIndex, split: Split) -> PackedRows:
    sources = [source(dataset, stream.name, split) for stream in index.streams(split)]
    num_rows = int(index.first_rows(split)[-1])
    return pack(range(num_rows), index.streams(split), index.first_rows(split), sources, fill_token=0)


@pytest.mark.parametrize("split", SPLITS)
def test_every_target_is_predicted_once_and_weights_are_those_of_the_rows(
    dataset: Dataset, index: RowIndex, split: Split
) -> None:
    packed = packed_rows(dataset, index, split)
    tokens: Counter[int] = Counter()
    targets: Counter[tuple[int, float]] = Counter()
    for name in OPTIONS:
        for document, (own, weights, spans) in enumerate(given(dataset, name, split)):
            if is_dropped(dataset, name, split, document):
                continue
            tokens.update(own.tolist())
            weighed = np.ones(len(own), np.float32) if weights is None else weights
            for start, stop in [(0, len(own))] if spans is None else spans.tolist():
                targets.update(zip(own[start + 1 : stop].tolist(), weighed[start + 1 : stop].tolist(), strict=True))
    inside, predicted = packed.segments >= 0, packed.targets != -100
    assert Counter(packed.token_ids[inside].tolist()) == tokens
    assert Counter(zip(packed.targets[predicted].tolist(), packed.weights[predicted].tolist(), strict=True)) == targets
    assert not np.any(packed.weights[~predicted])

    rows = [(stream, row) for stream in index.streams(split) for row in range(stream.num_rows)]
    weights = packed.weights.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose([stream.weight(row) for stream, row in rows], weights, rtol=1e-12)
    assert [stream.tokens(row) for stream, row in rows] == inside.sum(axis=1).tolist()
    for stream, first in zip(index.streams(split), index.first_rows(split)[:-1].tolist(), strict=True):
        some = np.random.default_rng(0).permutation(stream.num_rows)[:40]
        weight, count = stream.sums(some)
        assert weight == pytest.approx(weights[first + some].sum(), rel=1e-12)
        assert count == inside[first + some].sum()


def test_sequential_streams_stay_in_the_order_of_their_source(dataset: Dataset, index: RowIndex) -> None:
    assert [stream.sequential for stream in index.train] == [name in ("lecture", "queue") for name in OPTIONS]
    for stream in index.train:
        in_order = [place for row in twin(stream) for place in row]
        assert (in_order == sorted(in_order)) == stream.sequential


def test_whole_documents_lie_in_one_row_and_long_ones_in_pieces_that_end_at_borders(dataset: Dataset, index: RowIndex) -> None:
    for stream in index.train:
        if stream.name not in ("pairs", "queue", "talk", "whole"):
            continue
        docs = dataset.streams[stream.name][0]
        seen: dict[int, list[tuple[int, int]]] = {}
        for row in range(stream.num_rows):
            for span in stream.spans(row):
                seen.setdefault(span.document, []).append((span.start, span.length))
        for document, parts in seen.items():
            own = docs[document]
            assert isinstance(own, StoredDocument)
            if len(own.tokens) <= LENGTH:
                assert parts == [(0, len(own.tokens))]
                continue
            ends = [start + length for start, length in sorted(parts)]
            for (_, length), end in zip(sorted(parts)[:-1], ends, strict=False):
                assert length == LENGTH or end in own.borders
                assert length > LENGTH // 2
        assert any(len(parts) > 2 for parts in seen.values()) == (stream.name in ("queue", "whole"))


def test_whole_documents_of_a_sequential_stream_fill_row_after_row(index: RowIndex) -> None:
    (queue,) = [stream for stream in index.train if stream.name == "queue"]
    for number in range(len(queue.window_rows) - 1):
        rows = [queue.spans(row) for row in range(*queue.window_rows[number : number + 2].tolist())]
        for row, following in zip(rows, rows[1:], strict=False):
            assert sum(span.length for span in row) + following[0].length > LENGTH


@pytest.mark.parametrize("split", SPLITS)
def test_documents_stay_in_their_window_and_windows_begin_where_told(dataset: Dataset, index: RowIndex, split: Split) -> None:
    digests = read_manifest(dataset.store, "store.json")[FILES]
    for stream in index.streams(split):
        key = f"streams/{stream.name}/{split}/{SHARDS}"
        assert digest((dataset.store / key).read_bytes()) == digests[key]
        samples = ShardTable.parse((dataset.store / key).read_bytes()).samples.tolist()
        window = [shard // 2 for shard, count in enumerate(samples) for _ in range(count)]
        counts = np.diff(stream.window_rows)
        of_rows = [number for number, count in enumerate(counts) for _ in range(count)]
        for row, number in enumerate(of_rows):
            assert {window[span.document] for span in stream.spans(row)} == {number}
    if split == "train":
        assert all(len(stream.window_rows) > 2 for stream in index.train if stream.name != "code"), "several windows"


def test_facts_count_what_lies_in_rows(dataset: Dataset, index: RowIndex) -> None:
    facts = index.facts
    for split, of_split in zip(SPLITS, (facts.train, facts.validation), strict=True):
        for own, stream in zip(of_split, index.streams(split), strict=True):
            rows = twin(stream)
            cuts, at_borders = 0, 0
            docs = dataset.streams[own.name][SPLITS.index(split)]
            for number in range(len(stream.window_rows) - 1):
                for row in range(*stream.window_rows[number : number + 2].tolist()):
                    if row + 1 == stream.window_rows[number + 1]:
                        continue
                    document, place = rows[row][-1]
                    borders = getattr(docs[document], "borders", ())
                    tokens = given(dataset, own.name, split)[document][0]
                    cuts, at_borders = cuts + 1, at_borders + (place + 1 == len(tokens) or place + 1 in borders)
            assert own.rows == stream.num_rows == len(rows)
            assert own.tokens == sum(map(len, rows))
            assert own.documents == len({document for row in rows for document, _ in row})
            assert own.cuts == cuts
            assert own.cuts_at_borders == at_borders
            assert own.fewest_rows <= own.rows
            assert (own.sequential, own.pairs) == (own.name in ("lecture", "queue"), own.name == "pairs")
            too_long = sum(is_dropped(dataset, own.name, split, document) for document in range(len(docs)))
            assert own.dropped == ({"too_long": too_long} if too_long else {})
    assert facts.fill == facts.tokens / (facts.rows * LENGTH)


def rebuild(dataset: Dataset, out: Path, *, seed: int = 5, length: int = LENGTH, **changes: Any) -> IndexFacts:
    data = dataset.data.model_copy(update=changes)
    chosen = select(dataset.store, data)
    return build_index(dataset.store, out, data=data, sequence_length=length, seed=seed, selection=chosen)


def test_same_inputs_give_the_same_bytes_and_another_seed_length_or_window_another_index(
    dataset: Dataset, tmp_path: Path
) -> None:
    def build(name: str, **changes: Any) -> str:
        rebuild(dataset, tmp_path / name, **changes)
        return digest((tmp_path / name / "index.json").read_bytes())

    assert build("again") == digest((dataset.index / "index.json").read_bytes())
    others = {build("seed", seed=6), build("length", length=33), build("window", window_shards=3)}
    assert len(others | {build("again")}) == 4
    assert not list(tmp_path.glob(".building*"))


def test_rows_do_not_depend_on_the_parts_that_the_store_was_built_in(dataset: Dataset, tmp_path: Path) -> None:
    """Parts begin new shards, so one large part is another store; but where a table ends within a window changes nothing."""
    from outgrow.streaming.document_table import DocumentTable, read_tables
    from outgrow.streaming.token_block import join
    from outgrow.streaming.window_documents import windows_of

    tables = list(read_tables(dataset.store, "books", "train", read_manifest(dataset.store, "store.json")[FILES]))
    whole = join(tables, languages=False, signatures=False)
    assert len(tables) > 3

    def columns(parts: list[DocumentTable]) -> list[Any]:
        return [
            (w.number, w.first, w.lengths.tolist(), w.weight.tolist(), w.uniform.tolist(), w.borders.tokens.tolist())
            for w in windows_of(parts, 2)
        ]

    assert columns(tables) == columns([whole])
    assert len(columns([whole])) > 3
    with pytest.raises(DataError, match="order of their shards"):
        columns([whole, whole])


def test_an_index_that_is_there_is_only_opened(dataset: Dataset) -> None:
    before = (dataset.index / "index.json").stat().st_mtime_ns
    assert rebuild(dataset, dataset.index).fingerprint == dataset.card.indexes[0].fingerprint
    assert (dataset.index / "index.json").stat().st_mtime_ns == before


def test_of_two_builds_of_one_index_the_second_takes_the_firsts(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[IndexFacts] = []

    def commit_late(folder: Path, name: str, facts: dict[str, Any]) -> None:
        commit(folder, name, facts)
        monkeypatch.setattr("outgrow.streaming.row_building.commit", commit)
        monkeypatch.setattr("outgrow.streaming.aside._PREFIX", ".building-other-")  # as of another process
        first.append(rebuild(dataset, tmp_path / "rows", seed=1))

    monkeypatch.setattr("outgrow.streaming.row_building.commit", commit_late)
    assert rebuild(dataset, tmp_path / "rows", seed=1) == first[0]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_the_fingerprint_is_of_all_that_decides_the_rows() -> None:
    def of(length: int = 32, seed: int = 5, store: str = "s", data: Any = None, **stream: Any) -> str:
        section = data_of(["a", "b"], {"b": stream}, **(data or {}))
        return index_fingerprint(store, data=section, sequence_length=length, seed=seed)

    changed = [
        of(),
        of(length=33),
        of(seed=6),
        of(store="t"),
        of(data={"window_shards": 3}),
        of(data={"duplicates": {"remove": "exact"}}),
        of(order="sequential"),
        of(split="never"),
        of(split="never", too_long="drop"),
        of(filter={"min_chars": 3}),
    ]
    assert len(set(changed)) == len(changed)
    assert of(data={"loader_workers": 3, "validation_fraction": 0.1}, epochs=2.0) == of()


# --- what is left out -------------------------------------------------------------------------------------------------


def test_dropped_documents_are_listed_with_their_reasons_and_twins(tmp_path: Path) -> None:
    docs = [(np.full(n, i + 1), None) for i, n in enumerate([10, 40, 7, 33, 20, 5])]
    options = {"z": {"split": "never", "too_long": "drop"}}
    write_store(tmp_path / "store", {"z": (docs, []), "a": (docs, docs[:2])})
    every = keep_all({"z": 6, "a": 6}).choices
    few = {name: getattr(every["a", "train"], name)[:2] for name in ("reason", "twin_stream", "twin_validation", "twin")}
    chosen = Choice(
        reason=np.array([0, 0, TOO_SHORT, 0, 0, DUPLICATE], np.uint8),
        twin_stream=np.array([-1, -1, -1, -1, -1, 1], np.int16),
        twin_validation=np.array([0, 0, 0, 0, 0, 1], np.bool_),
        twin=np.array([-1, -1, -1, -1, -1, 1], np.int64),
    )
    selection = Selection(names=("z", "a"), choices={**every, ("z", "train"): chosen, ("a", "validation"): Choice(**few)})
    data = data_of(["z", "a"], options)
    facts = build_index(tmp_path / "store", tmp_path / "rows", data=data, sequence_length=32, seed=1, selection=selection)
    assert facts.train[1].dropped == {"too_short": 1, "duplicate": 1, "too_long": 2}
    assert (facts.train[1].documents, facts.train[1].tokens) == (2, 30)
    assert facts.train[0].dropped == {}
    _, digests = read_facts(tmp_path / "rows")
    table = read_dropped_table(tmp_path / "rows", "z", "train", digests["z.train.dropped.safetensors"])
    assert table.document.tolist() == [1, 2, 3, 5]
    assert table.reason.tolist() == [TOO_LONG, TOO_SHORT, TOO_LONG, DUPLICATE]
    assert table.twin.tolist() == [-1, -1, -1, 1]
    assert table.twin_validation.tolist() == [False, False, False, True]
    assert table.twin_stream.tolist() == [-1, -1, -1, 0], "stream a is the first of the index"


def build_one(tmp_path: Path, docs: Any, length: int = 32, **options: Any) -> IndexFacts:
    write_store(tmp_path / "store", {"x": (docs, [])})
    data = data_of(["x"], {"x": options})
    chosen = select(tmp_path / "store", data)
    return build_index(tmp_path / "store", tmp_path / "rows", data=data, sequence_length=length, seed=1, selection=chosen)


def test_a_document_that_is_too_long_stops_the_build_by_name(tmp_path: Path) -> None:
    docs = [(np.full(n, 7), None) for n in (10, 40, 7, 90, 33)]
    with pytest.raises(DataError) as caught:
        build_one(tmp_path, docs, split="never")
    assert str(caught.value) == (
        "x#3: stream 'x': a document of 90 tokens does not fit whole into a row of 32 (2 others of the stream do not either)\n"
        "  raise sequence_length to 90, or set too_long: split or drop for the stream"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_pair_that_is_too_long_is_never_offered_to_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too_long: drop for the stream") as caught:
        build_one(tmp_path, [pair(1, prompt=4, chosen=30, rejected=3)], split="never")
    assert "others" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"split": "never", "too_long": "split"}])
def test_pairs_of_a_stream_whose_documents_may_be_divided_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(DataError, match="a pair stays in one row"):
        build_one(tmp_path, pairs(1, 3), **options)


def test_a_stream_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    docs = [(np.full(40, 7), None), (np.full(50, 8), None)]
    with pytest.raises(DataError, match="'x' holds no document to train on; dropped: 2 too_long"):
        build_one(tmp_path, docs, split="never", too_long="drop")


def test_a_stream_of_which_nothing_is_learned_is_refused(tmp_path: Path) -> None:
    """Such as one whose ``chat.roles`` nobody plays: a step of its rows would have no loss."""
    unlearned = [(np.full(9, 7), np.zeros(9, np.float32)), (np.full(40, 8), np.eye(1, 40, dtype=np.float32)[0])]
    with pytest.raises(DataError, match="stream 'x': none of its 49 tokens is learned, for all loss weights are 0"):
        build_one(tmp_path, unlearned)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["index.json", "books.train.windows.safetensors", "code.validation.windows.safetensors"])
def test_a_flipped_byte_in_the_tables_is_refused_at_once(dataset: Dataset, tmp_path: Path, file: str) -> None:
    rebuild(dataset, tmp_path / "rows")
    flip(tmp_path / "rows" / file, -3)
    with pytest.raises(IntegrityError, match=file.replace(".", r"\.")):
        RowIndex.open(tmp_path / "rows")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_rows_are_read_and_checked_window_by_window(dataset: Dataset, tmp_path: Path) -> None:
    rebuild(dataset, tmp_path / "rows")
    file = tmp_path / "rows/books.train.rows"
    whole = file.read_bytes()
    flip(file, -1)
    books = RowIndex.open(tmp_path / "rows").train[0]
    assert books.spans(0)
    with pytest.raises(IntegrityError, match=rf"books\.train\.rows: the bytes of window {len(books.window_rows) - 2} differ"):
        books.spans(books.num_rows - 1)
    file.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="differ"):
        books.spans(books.num_rows - 1)
    file.unlink()
    with pytest.raises(IntegrityError, match=r"books\.train\.rows: the file is missing"):
        RowIndex.open(tmp_path / "rows").train[0].spans(0)


def test_few_windows_are_kept(index: RowIndex) -> None:
    reads: list[int] = []
    own = index.train[0]

    def read(number: int) -> Window:
        reads.append(number)
        return own.read(number)

    stream = replace(own, read=read)
    first = own.window_rows[:-1].tolist()
    for row in [first[0], first[0] + 1, first[1], first[0], first[2], first[0], first[1]]:
        stream.weight(row)
    assert reads == [0, 1, 2, 1]


def test_an_index_that_was_never_finished_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    rebuild(dataset, tmp_path / "rows")
    (tmp_path / "rows/COMMITTED").unlink()
    with pytest.raises(DataError, match="never finished"):
        RowIndex.open(tmp_path / "rows")


def test_orders_never_change() -> None:
    """A checkpoint taken today goes on with the same rows after every upgrade."""
    assert permutation(10, "rows", 7, "books", 0).tolist() == [2, 3, 8, 1, 6, 9, 0, 5, 7, 4]


SHUFFLED = """
6:0+3 4:0+3 3:0+8 | 3:8+14 | 3:22+9 5:0+3 | 5:3+3 1:0+10 | 1:10+10 0:0+2 | 0:2+3 2:0+9 | 7:0+10
9:0+14 | 8:0+2 11:0+1 10:0+7
"""
SEQUENTIAL = """
0:0+5 1:0+9 | 1:9+11 | 2:0+9 3:0+5 | 3:5+14 | 3:19+12 4:0+1 | 4:1+2 5:0+6 6:0+3 | 7:0+10
8:0+2 9:0+12 | 9:12+2 10:0+7 11:0+1
"""
WHOLE = """
6:0+3 1:0+10 | 4:0+3 1:10+10 | 3:0+14 | 3:14+14 | 3:28+3 7:0+10 | 5:0+6 | 0:0+5 2:0+9
9:0+14 | 8:0+2 11:0+1 10:0+7
"""
WHOLE_SEQUENTIAL = """
0:0+5 | 1:0+10 | 1:10+10 | 2:0+9 | 3:0+14 | 3:14+14 | 3:28+3 4:0+3 5:0+6 | 6:0+3 7:0+10
8:0+2 | 9:0+14 | 10:0+7 11:0+1
"""


@pytest.mark.parametrize(
    ("split", "order", "rows"),
    [
        ("anywhere", "shuffled", SHUFFLED),
        ("anywhere", "sequential", SEQUENTIAL),
        ("never", "shuffled", WHOLE),
        ("never", "sequential", WHOLE_SEQUENTIAL),
    ],
)
def test_rows_never_change(tmp_path: Path, split: str, order: str, rows: str) -> None:
    """As above, of the rows themselves, a window a line; where they do change, ``FORMAT`` must count up."""
    own = np.array([5, 20, 9, 31, 3, 6, 3, 10, 2, 14, 7, 1])
    borders = Borders.of(np.full(12, 1, np.int32), (own // 2).astype(np.int32))
    write_table_store(tmp_path / "store", {"x": [table_of(own, borders=borders, tokens_a_shard=80)]})
    options = {"split": split, "order": order, "too_long": "split" if split == "never" else "stop"}
    data = data_of(["x"], {"x": options}, window_shards=1)
    build_index(tmp_path / "store", tmp_path / "x", data=data, sequence_length=14, seed=3, selection=keep_all({"x": 12}))
    (stream,) = RowIndex.open(tmp_path / "x").train
    found = [" ".join("{}:{}+{}".format(*span) for span in stream.spans(row)) for row in range(stream.num_rows)]
    first, after, end = stream.window_rows.tolist()
    assert [" | ".join(found[:after]), " | ".join(found[after:end])] == rows.split("\n")[1:-1]
    assert first == 0


@pytest.mark.parametrize(
    ("split", "order", "most"),
    [("anywhere", "shuffled", 1.005), ("anywhere", "sequential", 1.005), ("never", "shuffled", 1.01)],
)
def test_rows_of_many_windows_are_few(tmp_path: Path, split: str, order: str, most: float) -> None:
    own = np.minimum(lengths.articles(40_000), 2048)
    table = table_of(own, borders=lengths.sentences(own), tokens_a_shard=2**20)
    write_table_store(tmp_path / "store", {"x": [table]})
    data = data_of(["x"], {"x": {"split": split, "order": order}}, window_shards=8)
    selection = keep_all({"x": len(own)})
    facts = build_index(tmp_path / "store", tmp_path / "x", data=data, sequence_length=2048, seed=3, selection=selection)
    fewest = -(-int(own.sum()) // 2048) if split == "anywhere" else lower_bound(own, 2048)
    assert len(RowIndex.open(tmp_path / "x").train[0].window_rows) == 5
    assert facts.rows <= most * fewest
