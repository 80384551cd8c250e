"""Builds row indexes: the documents of a store that were chosen become rows, window by window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.recipes.schema.data import Data
from outgrow.recipes.schema.streams import Stream
from outgrow.storage import fingerprint
from outgrow.streaming.aside import aside_folder, put_in_place, remove_abandoned
from outgrow.streaming.document_table import read_tables
from outgrow.streaming.documents import Documents
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, STORE_MANIFEST, commit, is_committed, read_manifest
from outgrow.streaming.row_files import DroppedTable, WindowWriter, dropped_file, save_table
from outgrow.streaming.row_windows import lay, weigh
from outgrow.streaming.rows import IndexFacts, SplitFacts, read_facts
from outgrow.streaming.selection import REASONS, TOO_LONG, Choice, Selection, Split, selection_identity
from outgrow.streaming.shuffle import permutation
from outgrow.streaming.window_documents import WindowDocuments, windows_of

FORMAT = 2
"""Counts up when the same inputs would give other rows."""
Int64: TypeAlias = npt.NDArray[np.int64]


def index_fingerprint(store_fingerprint: str, *, data: Data, sequence_length: int, seed: int) -> str:
    """sha256 of all that decides the rows: the store, the choice among its documents, and how they are laid."""
    return fingerprint(
        {
            "rows": FORMAT,
            "store": store_fingerprint,
            "selection": selection_identity(data),
            "length": sequence_length,
            "window": data.window_shards,
            "seed": seed,
            "streams": {stream.name: [stream.order, stream.split, stream.too_long] for stream in data.streams},
        }
    )


def build_index(store: Path, out: Path, *, data: Data, sequence_length: int, seed: int, selection: Selection) -> IndexFacts:
    """Make the row index of a committed store in the folder ``out``; one that is there already is only opened.

    Written aside beside ``out`` and renamed; a window at a time is in memory. Raises ``DataError`` where a stream has nothing
    to train on (of ``use: validation``: to validate on) or all of its loss weights are 0, and where a document is longer than a
    row and the recipe says ``too_long: stop``.
    """
    if is_committed(out):
        return read_facts(out)[0]
    manifest = read_manifest(store, STORE_MANIFEST)
    pairs = {entry["name"]: bool(entry["pairs"]) for entry in manifest["streams"]}
    streams = sorted(data.streams, key=lambda stream: stream.name)
    remove_abandoned(out.parent)
    with aside_folder(out.parent) as aside:
        facts: dict[Split, list[SplitFacts]] = {"train": [], "validation": []}
        for split, own in facts.items():
            for stream in streams:
                builder = _SplitBuilder(
                    store=store,
                    digests=manifest[FILES],
                    stream=stream,
                    split=split,
                    pairs=pairs[stream.name],
                    choice=selection.choices[stream.name, split],
                    twin_streams=np.array([[s.name for s in streams].index(name) for name in selection.names], np.int16),
                    sequence_length=sequence_length,
                    window_shards=data.window_shards,
                    seed=seed,
                )
                own.append(builder.build(aside))
        made = IndexFacts(
            fingerprint=index_fingerprint(manifest["fingerprint"], data=data, sequence_length=sequence_length, seed=seed),
            store_fingerprint=manifest["fingerprint"],
            sequence_length=sequence_length,
            window_shards=data.window_shards,
            seed=seed,
            train=tuple(facts["train"]),
            validation=tuple(facts["validation"]),
        )
        commit(aside, INDEX_MANIFEST, made.to_dict())
        if not put_in_place(aside, out):  # another build of the same index was faster
            return read_facts(out)[0]
    return made


@dataclass(frozen=True, eq=False, kw_only=True)
class _SplitBuilder:
    """The rows of one split of one stream. ``twin_streams`` int16: the place in the index of each of ``Selection.names``."""

    store: Path
    digests: Mapping[str, str]
    stream: Stream
    split: Split
    pairs: bool
    choice: Choice
    twin_streams: npt.NDArray[np.int16]
    sequence_length: int
    window_shards: int
    seed: int

    @property
    def _is_whole(self) -> bool:
        return self.stream.split == "never"

    @property
    def _is_asked_for(self) -> bool:
        """Whether the stream is there for this split; the other may be empty."""
        return self.split == ("train" if self.stream.use == "training" else "validation")

    @cached_property
    def _documents(self) -> Documents:
        return Documents(self.store, self.stream.name, self.split, self.digests, open_shards=2)

    def build(self, folder: Path) -> SplitFacts:
        """Write its files into ``folder``."""
        if self.pairs and not (self._is_whole and self.stream.too_long != "split"):
            raise DataError(
                f"stream '{self.stream.name}' holds preference pairs, and a pair stays in one row",
                hint="set split: never and too_long: stop or drop for the stream",
            )
        reason = self.choice.reason.copy()
        seen = documents = tokens = rows = fewest = cuts = cuts_at_borders = 0
        weight = 0.0
        tables = read_tables(self.store, self.stream.name, self.split, self.digests)
        with WindowWriter(folder, self.stream.name, self.split) as writer:
            for window_documents in windows_of(tables, self.window_shards):
                order = self._drawn(window_documents, reason)
                laid = lay(
                    window_documents,
                    order,
                    self.sequence_length,
                    whole=self._is_whole,
                    sequential=self.stream.order == "sequential",
                )
                window = weigh(laid.window, window_documents, lambda document: self._documents.weights(document))
                writer.write(window)
                seen += len(window_documents)
                documents += len(order)
                tokens += window.num_tokens
                rows += window.num_rows
                weight += float(window.weights.sum())
                fewest += laid.fewest_rows
                cuts += max(window.num_rows - 1, 0)
                cuts_at_borders += laid.cuts_at_borders
            writer.finish()
        assert seen == len(self.choice), "the choice is of another store"
        facts = SplitFacts(
            name=self.stream.name,
            documents=documents,
            tokens=tokens,
            rows=rows,
            fewest_rows=fewest,
            cuts=cuts,
            cuts_at_borders=cuts_at_borders,
            sequential=self.stream.order == "sequential",
            pairs=self.pairs,
            dropped=self._save_dropped(folder, reason),
        )
        if self._is_asked_for and not weight:
            self._stop_with_nothing_learned(facts)
        return facts

    def _drawn(self, documents: WindowDocuments, reason: npt.NDArray[np.uint8]) -> Int64:
        """The documents of a window that are used, in the order in which they are laid. Marks in ``reason`` what is too
        long."""
        own = reason[documents.first : documents.first + len(documents)]
        if self._is_whole and self.stream.too_long != "split":
            too_long = (own == 0) & (documents.lengths > self.sequence_length)
            if too_long.any():
                if self.stream.too_long == "stop":
                    self._stop_at_too_long()
                own[too_long] = TOO_LONG
        if self.stream.order == "sequential":
            return np.flatnonzero(own == 0)
        drawn = permutation(len(documents), "documents", self.seed, self.stream.name, self.split, documents.number)
        used: Int64 = drawn[own[drawn] == 0]
        return used

    def _save_dropped(self, folder: Path, reason: npt.NDArray[np.uint8]) -> dict[str, int]:
        """Write the list of documents that are in no row; how many there are of each reason."""
        document = np.flatnonzero(reason)
        twin_stream = self.choice.twin_stream[document]
        table = DroppedTable(
            document=document,
            reason=reason[document],
            twin_stream=np.where(twin_stream < 0, np.int16(-1), self.twin_streams[twin_stream]),
            twin_validation=self.choice.twin_validation[document],
            twin=self.choice.twin[document],
        )
        save_table(table, folder / dropped_file(self.stream.name, self.split))
        return {REASONS[code]: count for code, count in sorted(Counter(table.reason.tolist()).items())}

    def _stop_at_too_long(self) -> NoReturn:
        """Raises ``DataError`` that names the longest document of the split; its tables are read again to find it."""
        lengths = np.concatenate([t.lengths for t in read_tables(self.store, self.stream.name, self.split, self.digests)])
        lengths[self.choice.reason != 0] = 0
        count, longest = int((lengths > self.sequence_length).sum()), int(lengths.argmax())
        others = f" ({count - 1:,} others of the stream do not either)" if count > 1 else ""
        either = "split or drop" if not self.pairs else "drop"
        raise DataError(
            f"stream '{self.stream.name}': a document of {lengths[longest]:,} tokens does not fit whole into a row of "
            f"{self.sequence_length:,}{others}",
            where=self._documents.source(longest),
            hint=f"raise sequence_length to {lengths[longest]:,}, or set too_long: {either} for the stream",
        )

    def _stop_with_nothing_learned(self, facts: SplitFacts) -> NoReturn:
        does, learned = ("train", "learned") if self.split == "train" else ("validate", "measured")
        if facts.rows:
            raise DataError(
                f"stream '{self.stream.name}': none of its {facts.tokens:,} tokens is {learned}, for all loss weights are 0",
                hint="check that chat.roles names roles of its dialogues, and chat.thinking_weight",
            )
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts.dropped.items())
        raise DataError(
            f"stream '{self.stream.name}' holds no document to {does} on" + (f"; dropped: {dropped}" if dropped else ""),
            hint="check its files, its filter, data.duplicates, and that data.validation_fraction leaves some",
        )
