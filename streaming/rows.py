"""The row index of a token store: which tokens of which documents make up each row. Pure numpy; no token is read.

Within each stream and split the documents are shuffled inside windows of neighbouring shards, laid end to end and cut every
``sequence_length`` tokens. So every token is in exactly one row, only the last row of a stream's split is short, and reading
rows in order touches few shards at a time. Another length, window or seed is another index, not another store.

What a row predicts. The target of a position is the next token of the same document, also where the cut falls between the two:
the last position of a row then predicts the first token of the next row. So every token but the first of each document is
predicted exactly once, and the last token of a document predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save_file

from outgrow.contracts import Record
from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest, fingerprint
from outgrow.streaming.aside import aside_folder, put_in_place, remove_abandoned
from outgrow.streaming.documents import Documents
from outgrow.streaming.manifest import FILES, commit, is_committed, read_manifest
from outgrow.streaming.shuffle import permutation

FORMAT = 1
"""Counts up when the same inputs would give other rows."""
STORE_MANIFEST = "store.json"
INDEX_MANIFEST = "index.json"
Split: TypeAlias = Literal["train", "validation"]
Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]


class Span(NamedTuple):
    """``length`` tokens of a document from token ``start`` on; ``document`` counts the samples of the stream's MDS folder."""

    document: int
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class SplitFacts(Record):
    """Counts of one split of one stream."""

    name: str
    documents: int
    tokens: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class IndexFacts(Record):
    """What a row index holds; streams are in the order of their names, which numbers the rows."""

    fingerprint: str
    store_fingerprint: str
    sequence_length: int
    window_shards: int
    seed: int
    train: tuple[SplitFacts, ...]
    validation: tuple[SplitFacts, ...]

    @property
    def rows(self) -> int:
        """Rows of the training split."""
        return sum(split.rows for split in self.train)

    @property
    def tokens(self) -> int:
        """Tokens of the training split."""
        return sum(split.tokens for split in self.train)

    @property
    def validation_rows(self) -> int:
        return sum(split.rows for split in self.validation)

    @property
    def fill(self) -> float:
        """Share of the training rows' positions that hold a token; 0 where there is no row."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0


@dataclass(frozen=True, eq=False)
class StreamRows:
    """The rows of one split of one stream.

    order        int64 [documents]    the document at each place, as numbered in the MDS folder
    ends         int64 [documents]    tokens up to and including the document at each place
    weights      float64 [rows]       sum of the loss weights of the row's targets
    window_rows  int64 [windows + 1]  first row of each window; a row belongs to the window of its first token
    """

    name: str
    sequence_length: int
    order: Int64
    ends: Int64
    weights: Float64
    window_rows: Int64

    @property
    def num_rows(self) -> int:
        return len(self.weights)

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def spans(self, row: int) -> list[Span]:
        """What lies in a row, in order."""
        start = row * self.sequence_length
        stop = min(start + self.sequence_length, self.num_tokens)
        first = int(np.searchsorted(self.ends, start, "right"))
        last = int(np.searchsorted(self.ends, stop, "left"))
        ends = [int(self.ends[first - 1]) if first else 0, *self.ends[first : last + 1].tolist()]
        return [
            Span(document, max(start, begin) - begin, min(stop, end) - max(start, begin))
            for document, begin, end in zip(self.order[first : last + 1].tolist(), ends[:-1], ends[1:], strict=True)
        ]


@dataclass(frozen=True, eq=False)
class RowIndex:
    """An opened row index. Rows are numbered over the streams in order, training and validation each from 0."""

    facts: IndexFacts
    train: tuple[StreamRows, ...]
    validation: tuple[StreamRows, ...]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises ``DataError`` where the index was never committed, ``IntegrityError`` where a byte differs."""
        manifest = read_manifest(folder, INDEX_MANIFEST)
        facts = IndexFacts.from_dict({name: manifest[name] for name in IndexFacts.__dataclass_fields__})
        return cls(
            facts,
            tuple(_read_rows(folder, manifest, "train", split, facts.sequence_length) for split in facts.train),
            tuple(_read_rows(folder, manifest, "validation", split, facts.sequence_length) for split in facts.validation),
        )

    def streams(self, split: Split) -> tuple[StreamRows, ...]:
        return self.train if split == "train" else self.validation

    def first_rows(self, split: Split) -> Int64:
        """Number of the first row of each stream, and the count of all rows, int64 [streams + 1]."""
        return np.cumsum([0, *(stream.num_rows for stream in self.streams(split))], dtype=np.int64)

    def weights(self, split: Split) -> Float64:
        """Sum of loss weights of every row, float64 [rows]."""
        return np.concatenate([np.empty(0), *(stream.weights for stream in self.streams(split))])

    def tokens(self, split: Split) -> Int64:
        """Tokens of every row, int64 [rows]: the sequence length but in the last row of each stream."""
        counts = np.full(self.first_rows(split)[-1], self.facts.sequence_length, np.int64)
        for stream, after in zip(self.streams(split), self.first_rows(split)[1:], strict=True):
            if stream.num_rows:
                counts[after - 1] = stream.num_tokens - (stream.num_rows - 1) * self.facts.sequence_length
        return counts


# --- building ---------------------------------------------------------------------------------------------------------


def index_fingerprint(store_fingerprint: str, *, sequence_length: int, window_shards: int, seed: int) -> str:
    """sha256 of all that decides the rows."""
    return fingerprint(
        {"rows": FORMAT, "store": store_fingerprint, "length": sequence_length, "window": window_shards, "seed": seed}
    )


def build_index(store: Path, out: Path, *, sequence_length: int, window_shards: int, seed: int) -> IndexFacts:
    """Make the row index of a committed store in the folder ``out``; one that is there already is only opened.

    Written aside beside ``out`` and renamed. The store's manifest gives ``fingerprint`` and the digests of its files.
    """
    if is_committed(out):
        return RowIndex.open(out).facts
    manifest = read_manifest(store, STORE_MANIFEST)
    names = sorted({key.split("/")[1] for key in manifest[FILES] if key.startswith("streams/")})
    remove_abandoned(out.parent)
    with aside_folder(out.parent) as aside:
        facts: dict[Split, list[SplitFacts]] = {"train": [], "validation": []}
        for split in facts:
            for name in names:
                rows = _cut(store, manifest[FILES], name, split, sequence_length, window_shards, seed)
                save_file(_arrays(rows), aside / _file(name, split))
                facts[split].append(
                    SplitFacts(name=name, documents=len(rows.order), tokens=rows.num_tokens, rows=rows.num_rows)
                )
        made = IndexFacts(
            fingerprint=index_fingerprint(
                manifest["fingerprint"], sequence_length=sequence_length, window_shards=window_shards, seed=seed
            ),
            store_fingerprint=manifest["fingerprint"],
            sequence_length=sequence_length,
            window_shards=window_shards,
            seed=seed,
            train=tuple(facts["train"]),
            validation=tuple(facts["validation"]),
        )
        commit(aside, INDEX_MANIFEST, made.to_dict())
        if not put_in_place(aside, out):  # another build of the same index was faster
            return RowIndex.open(out).facts
    return made


def _cut(
    store: Path, digests: Mapping[str, str], name: str, split: Split, sequence_length: int, window_shards: int, seed: int
) -> StreamRows:
    """Shuffle the documents of one split of one stream within windows, and cut them into rows."""
    folder = f"streams/{name}/{split}"
    documents = load(_read_checked(store / folder / "documents.safetensors", digests[f"{folder}/documents.safetensors"]))
    window = documents["shard"].astype(np.int64) // window_shards
    if np.any(np.diff(window) < 0):
        raise DataError("documents are not in the order of their shards", where=str(store / folder))
    # Where each window's documents begin; each window draws by itself, so it does not depend on those before it.
    bounds = np.searchsorted(window, np.arange(window[-1] + 2 if len(window) else 1))
    order = _concatenate(
        begin + permutation(end - begin, "documents", seed, name, split, number)
        for number, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    )
    lengths = documents["lengths"][order]
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1]) if len(ends) else 0
    num_rows = -(-tokens // sequence_length)
    window_starts = np.concatenate([[0], ends])[bounds]
    rows = StreamRows(
        name=name,
        sequence_length=sequence_length,
        order=order,
        ends=ends,
        weights=_uniform_weights(ends, tokens, num_rows, sequence_length),
        window_rows=-(-window_starts // sequence_length),
    )
    if not documents["uniform"].all():
        _add_weights(rows, documents, Documents(store, name, split, digests, open_shards=4))
    return rows


def _uniform_weights(ends: Int64, tokens: int, num_rows: int, sequence_length: int) -> Float64:
    """Targets in each row, float64 [rows]: its tokens less the documents that end in it."""
    cuts = np.minimum(np.arange(num_rows + 1, dtype=np.int64) * sequence_length, tokens)
    targets: Int64 = np.diff(cuts) - np.diff(np.searchsorted(ends, cuts, "right"))
    return targets.astype(np.float64)


def _add_weights(rows: StreamRows, documents: Mapping[str, npt.NDArray[Any]], reader: Documents) -> None:
    """Correct ``rows.weights`` for documents whose loss weights are not all 1; only those that a cut divides are read."""
    ends = rows.ends
    begins = ends - documents["lengths"][rows.order]
    first, last = begins // rows.sequence_length, (ends - 1) // rows.sequence_length
    weighted = ~documents["uniform"][rows.order]
    whole = np.flatnonzero(weighted & (first == last))
    np.add.at(rows.weights, first[whole], documents["weight"][rows.order[whole]] - (ends[whole] - begins[whole] - 1))
    for place in np.flatnonzero(weighted & (first != last)).tolist():
        weights = reader.weights(int(rows.order[place]))
        assert weights is not None, "documents.safetensors says that the weights are not uniform"
        surplus = weights[1:].astype(np.float64) - 1
        np.add.at(rows.weights, np.arange(begins[place], ends[place] - 1) // rows.sequence_length, surplus)


def _concatenate(parts: Iterable[Int64]) -> Int64:
    return np.concatenate([np.empty(0, np.int64), *parts])


# --- files ------------------------------------------------------------------------------------------------------------


def _file(name: str, split: Split) -> str:
    return f"{name}.{split}.safetensors"


def _arrays(rows: StreamRows) -> dict[str, npt.NDArray[Any]]:
    return {"order": rows.order, "ends": rows.ends, "weights": rows.weights, "window_rows": rows.window_rows}


def _read_rows(folder: Path, manifest: Mapping[str, Any], split: Split, facts: SplitFacts, sequence_length: int) -> StreamRows:
    file = _file(facts.name, split)
    arrays = load(_read_checked(folder / file, manifest[FILES][file]))
    return StreamRows(name=facts.name, sequence_length=sequence_length, **arrays)


def _read_checked(path: Path, expected: str) -> bytes:
    """The bytes of a file, whole. Raises ``IntegrityError`` where it is missing or differs."""
    if not path.is_file():
        raise IntegrityError("the file is missing", where=str(path))
    data = path.read_bytes()
    if digest(data) != expected:
        raise IntegrityError("the bytes differ from their digest", where=str(path))
    return data
