"""A stream of the token store, written in parts, so that a build that was killed goes on after the last whole one.

A part is a run of a stream's work units. Its shards and document tables get their final names at once, for parts are written in
order; what makes a part count is a small JSON file, written last, that lists its shards and digests and holds all counts up to
its end. Where parts end depends on the input alone, so the store's bytes do not depend on who wrote them or how often they were
interrupted. Only the documents of the part in hand are in memory.

    store/streams/<name>/<split>/     shards and documents/NNNNN.safetensors, of finished parts and perhaps of the next
    store/streams/<name>/dropped.jsonl
    parts/<name>/00000.json           what makes part 0 count
    part/<split>/                     shards of the part that is being written
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from outgrow.contracts import Record
from outgrow.errors import DataError
from outgrow.storage import Storage, file_digest, sync_file, sync_folder, sync_tree
from outgrow.streaming import document_table
from outgrow.streaming.document_table import DocumentTable
from outgrow.streaming.shards import ShardEntry, stored_name
from outgrow.streaming.sources.document import Dropped, Input
from outgrow.streaming.token_block import TokenBlock, choose, join

if TYPE_CHECKING:
    from outgrow.streaming._mosaic import DocumentWriter

Split: TypeAlias = Literal["train", "validation"]
Counts: TypeAlias = tuple[tuple[int, int], ...]
SPLITS: tuple[Split, ...] = ("train", "validation")
DROPPED = "dropped.jsonl"
_PARTS = "parts"

# Where parts end decides the bytes of a store: who changes one of these counts up ``store.FORMAT``.
PART_BYTES = 64 * 1024 * 1024
"""Text of a part at the least, if it has so few documents that ``PART_DOCUMENTS`` does not end it."""
PART_DOCUMENTS = 256 * 1024
"""Documents after which a part ends in any case: their columns are held in memory, 0.6 KB each with a signature."""
_SHARDS_A_PART = 2
"""A part has text for this many shards at the least; its last shard is a short one."""
_MOST_PARTS = 20_000
"""Parts are larger where a stream has more text than this many would hold."""
_MOST_PARTS_NUMBERED = 100_000
"""Document tables are numbered with five digits."""


@dataclass(frozen=True, kw_only=True)
class StoreForm:
    """How the documents of a store are written; ``languages`` and ``signatures`` tell which columns its tables have."""

    vocab_size: int
    compression: Literal["none", "zstd"]
    shard_bytes: int
    languages: bool = False
    signatures: bool = False


@dataclass(frozen=True, kw_only=True)
class Totals(Record):
    """Counts of a stream from its beginning to the end of a part. Splits are keys of ``documents``, ``tokens`` and ``shards``;
    ``cleaned`` is documents changed and changes made, of each step; ``dropped_bytes`` the size of ``dropped.jsonl``."""

    units: int = 0
    num_bytes: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_bytes: int = 0
    cleaned: Counts = ()


@dataclass(frozen=True, kw_only=True)
class Part(Record):
    """A finished part: ``totals`` up to its end, its ``shards`` as MosaicML's index lists them and the digest of its document
    table, by split; one without a document has none. ``last`` where no part follows."""

    totals: Totals
    shards: dict[str, list[ShardEntry]]
    tables: dict[str, str]
    last: bool


class PartCut:
    """Where the parts of a stream end, asked after each unit; a function of the stream's inputs and form alone."""

    def __init__(self, inputs: Sequence[Input], form: StoreForm) -> None:
        total_bytes = sum(item.text_bytes for item in inputs)
        self._limit = max(PART_BYTES, _SHARDS_A_PART * form.shard_bytes, total_bytes // _MOST_PARTS)
        self._input_sizes = iter([item.text_bytes for item in inputs])
        self._input_end = 0

    def is_full(self, *, part_bytes: int, part_documents: int, stream_bytes: int) -> bool:
        """Whether a part ends here, ``stream_bytes`` after the stream's beginning: past the limit where an input ends, else
        past twice the limit."""
        while self._input_end < stream_bytes and (size := next(self._input_sizes, None)) is not None:
            self._input_end += size
        limit = self._limit if self._input_end == stream_bytes else 2 * self._limit
        return part_documents >= PART_DOCUMENTS or part_bytes >= limit


def has_parts(building: Path) -> bool:
    """Whether a building folder has a finished part."""
    return next((building / _PARTS).glob("*/*.json"), None) is not None


class StreamParts:
    """The parts of stream ``name`` in a building folder: those that are finished, and the writing of the next.

    Opening it takes away what an interrupted part left.
    """

    def __init__(self, building: Path, name: str, form: StoreForm) -> None:
        self.name = name
        self.folder = building / "store" / "streams" / name
        self._form = form
        self._aside = building / "part"
        self._parts = building / _PARTS / name
        self._storage = Storage(str(self._parts))
        self._count = sum(1 for _ in self._parts.glob("*.json"))
        self._last = self._read(self._count - 1) if self._count else None
        self._clear()

    @property
    def totals(self) -> Totals:
        """Counts up to the end of the last finished part."""
        return self._last.totals if self._last else Totals()

    @property
    def is_complete(self) -> bool:
        return self._last is not None and self._last.last

    def finished(self) -> Iterator[Part]:
        """The finished parts in order, read one at a time."""
        return map(self._read, range(self._count))

    def write(self, blocks: Iterator[TokenBlock], inputs: Sequence[Input]) -> None:
        """Write the blocks that follow the last finished part, to the stream's end, in parts."""
        cut = PartCut(inputs, self._form)
        block = next(blocks, None)
        while not self.is_complete:
            with _PartWriter(self._aside, self._form, self.totals) as part:
                full = False
                while block is not None and not full:
                    part.add(block)
                    full = cut.is_full(
                        part_bytes=part.num_bytes,
                        part_documents=part.num_documents,
                        stream_bytes=self.totals.num_bytes + part.num_bytes,
                    )
                    block = next(blocks, None)
            self._commit(part, last=block is None)

    def _commit(self, part: _PartWriter, *, last: bool) -> None:
        """Put the files of a written part in their places, durably, then the JSON file that makes it count."""
        if self._count == _MOST_PARTS_NUMBERED:
            raise DataError(f"stream '{self.name}' has too many documents for one stream", hint="divide it into two")
        sync_tree(self._aside)
        tables: dict[str, str] = {}
        for split in SPLITS:
            folder = self.folder / split
            (folder / document_table.FOLDER).mkdir(parents=True, exist_ok=True)
            if len(table := part.table(split)):
                table.save(folder, self._count)
                path = _table_file(folder, self._count)
                tables[split] = file_digest(path)
                sync_file(path)
            for entry in part.shards(split):
                (self._aside / split / stored_name(entry)).rename(folder / stored_name(entry))
            for changed in (folder, folder / document_table.FOLDER):
                sync_folder(changed)
        with open(self._aside / DROPPED, "rb") as lines, open(self.folder / DROPPED, "ab") as file:
            shutil.copyfileobj(lines, file)
            file.flush()
            totals = part.totals(dropped_bytes=file.tell())
        sync_file(self.folder / DROPPED)
        for changed in (self.folder, self.folder.parent):
            sync_folder(changed)
        self._last = Part(totals=totals, shards={split: part.shards(split) for split in SPLITS}, tables=tables, last=last)
        self._storage.write_json(f"{self._count:05d}.json", self._last.to_dict())
        self._count += 1

    def _read(self, number: int) -> Part:
        return Part.from_dict(json.loads((self._parts / f"{number:05d}.json").read_bytes()))

    def _clear(self) -> None:
        """Remove what was written after the last finished part."""
        shutil.rmtree(self._aside, ignore_errors=True)
        for split in SPLITS:
            for path in (self.folder / split).glob("shard.*"):
                if int(path.name.split(".")[1]) >= self.totals.shards[split]:
                    path.unlink()
            for path in (self.folder / split / document_table.FOLDER).glob("*"):
                if int(path.stem) >= self._count:
                    path.unlink()
        if (self.folder / DROPPED).exists():
            with open(self.folder / DROPPED, "r+b") as file:
                file.truncate(self.totals.dropped_bytes)


class _PartWriter:
    """The part that is being written: shards in ``folder``, columns of its documents in memory. A context manager."""

    def __init__(self, folder: Path, form: StoreForm, before: Totals) -> None:
        self.num_bytes = 0
        self._folder = folder
        self._form = form
        self._before = before
        self._until_end = ExitStack()
        self._writers: dict[Split, DocumentWriter] = {}
        self._tables: dict[Split, list[DocumentTable]] = {split: [] for split in SPLITS}
        self._units = self._pairs = 0
        self._dropped: Counter[str] = Counter()
        self._cleaned: Counts = ()

    def __enter__(self) -> _PartWriter:
        from outgrow.streaming._mosaic import DocumentWriter  # heavy, and a build's other processes never need it

        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._lines = self._until_end.enter_context(open(self._folder / DROPPED, "w", encoding="utf-8"))
        for split in SPLITS:
            writer = DocumentWriter(
                self._folder / split,
                vocab_size=self._form.vocab_size,
                compression=self._form.compression,
                shard_bytes=self._form.shard_bytes,
                first_shard=self._before.shards[split],
            )
            self._writers[split] = self._until_end.enter_context(writer)
        return self

    def __exit__(self, *error: object) -> None:
        self._until_end.__exit__(*error)  # type: ignore[arg-type]

    @property
    def num_documents(self) -> int:
        return sum(len(table) for tables in self._tables.values() for table in tables)

    def add(self, block: TokenBlock) -> None:
        shards = [
            self._writers["validation" if sample.validation else "train"].write(
                sample.tokens, source=sample.source, meta=sample.meta, weights=sample.weights, spans=sample.spans
            )
            for sample in block.samples()
        ]
        numbered = DocumentTable(**(block.table.arrays | {"shard": np.array(shards, np.int32)}))
        self._tables["train"].append(choose(numbered, ~block.validation))
        self._tables["validation"].append(choose(numbered, block.validation))
        for dropped in block.dropped:
            self._lines.write(_line(dropped))
            self._dropped[dropped.reason] += 1
        self._cleaned = _sum(self._cleaned, block.cleaned)
        self._units += 1
        self._pairs += int(block.paired.sum())
        self.num_bytes += block.num_bytes

    def shards(self, split: Split) -> list[ShardEntry]:
        """The shards of a split, once the part is written."""
        return self._writers[split].shards

    def table(self, split: Split) -> DocumentTable:
        return join(self._tables[split], languages=self._form.languages, signatures=self._form.signatures)

    def totals(self, *, dropped_bytes: int) -> Totals:
        """The counts up to the end of this part."""
        before = self._before
        return Totals(
            units=before.units + self._units,
            num_bytes=before.num_bytes + self.num_bytes,
            documents={s: before.documents[s] + sum(len(table) for table in self._tables[s]) for s in SPLITS},
            tokens={s: before.tokens[s] + sum(int(table.lengths.sum()) for table in self._tables[s]) for s in SPLITS},
            shards={s: before.shards[s] + len(self._writers[s].shards) for s in SPLITS},
            pairs=before.pairs + self._pairs,
            dropped=dict(sorted((Counter(before.dropped) + self._dropped).items())),
            dropped_bytes=dropped_bytes,
            cleaned=_sum(before.cleaned, self._cleaned),
        )


def _sum(before: Counts, more: Counts) -> Counts:
    """The counts of each cleaning step added; either may have none yet."""
    if not before or not more:
        return before or more
    return tuple((a[0] + b[0], a[1] + b[1]) for a, b in zip(before, more, strict=True))


def _table_file(folder: Path, part: int) -> Path:
    return folder / document_table.FOLDER / f"{part:05d}.safetensors"


def _line(dropped: Dropped) -> str:
    return json.dumps(asdict(dropped), sort_keys=True, ensure_ascii=False) + "\n"
