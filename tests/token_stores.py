"""Token stores of known documents, for tests that read: written with the real writer, committed like a build does it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from outgrow.contracts import DatasetCard, JobSpec, Layout, RunRef
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.data import Data
from outgrow.streaming.card import index_card
from outgrow.streaming.manifest import commit
from outgrow.streaming.row_building import build_index, index_fingerprint
from outgrow.streaming.selection import select
from outgrow.streaming.store import FORMAT, StoreFacts, count_stream, finish_stream, read_store
from outgrow.streaming.token_block import StoredDocument, TokenBlock, make_block

VOCAB = 1000
EOS = 0
Document: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32] | None]
"""Token ids, and the loss weight of each as a target (None: all 1)."""
Streams: TypeAlias = Mapping[str, tuple[Sequence[Document | StoredDocument], Sequence[Document | StoredDocument]]]
"""Training and validation documents by name of the stream."""


def documents(seed: int, count: int, *, longest: int = 60, weighted: bool = False) -> list[Document]:
    """``count`` documents of 1 to ``longest`` random tokens, the last one EOS; half of them with weights if ``weighted``."""
    rng = np.random.default_rng(seed)
    made: list[Document] = []
    for _ in range(count):
        tokens = rng.integers(1, VOCAB, int(rng.integers(1, longest + 1)))
        tokens[-1] = EOS
        weights = rng.random(len(tokens), dtype=np.float32) if weighted and rng.random() < 0.5 else None
        made.append((tokens, weights))
    return made


def pair(seed: int, *, prompt: int, chosen: int, rejected: int, source: str = "pair") -> StoredDocument:
    """A preference pair: an answer is ``prompt`` tokens that both begin with, then its own; prompts have weight 0."""
    rng = np.random.default_rng(seed)
    start, *answers = (rng.integers(1, VOCAB, n).astype(np.uint16) for n in (prompt, chosen, rejected))
    one, other = (np.concatenate([start, answer]) for answer in answers)
    weights = [np.concatenate([np.zeros(prompt, np.float32), np.ones(len(a), np.float32)]) for a in answers]
    tokens = np.concatenate([one, other])
    spans = np.array([[0, len(one)], [len(one), len(tokens)]], np.int32)
    return stored(tokens, source=source, weights=np.concatenate(weights), spans=spans)


def stored(tokens: npt.NDArray[Any], *, source: str = "x", meta: str = "{}", **changes: Any) -> StoredDocument:
    """A document of the store; ``borders``, ``chars``, ``content``, ``language`` and ``signature`` may be given."""
    given: dict[str, Any] = {
        "validation": False,
        "content": hashlib.sha256(tokens.astype("<i8").tobytes()).digest()[:16],
        "chars": 4 * len(tokens),
        "borders": np.empty(0, np.int32),
        **changes,
    }
    return StoredDocument(tokens=tokens.astype(np.uint16), source=source, meta=meta, **given)


def write_store(
    folder: Path,
    streams: Streams,
    *,
    compression: Any = "none",
    shard_bytes: int = 2000,
    part_documents: int = 1000,
    languages: bool = False,
    signatures: bool = False,
) -> None:
    """A committed store at ``folder``, in parts of ``part_documents``; ``languages`` and ``signatures`` where documents have
    such."""
    from outgrow.streaming import parts

    form = parts.StoreForm(
        vocab_size=VOCAB, compression=compression, shard_bytes=shard_bytes, languages=languages, signatures=signatures
    )
    building = folder.with_name(f"{folder.name}.building")
    made = [parts.StreamParts(building, name, form) for name in streams]
    with patch.object(parts, "PART_DOCUMENTS", part_documents):
        for number, (stream, splits) in enumerate(zip(made, streams.values(), strict=True)):
            stream.write(iter(_blocks(number, stream.name, splits, part_documents)), ())
    data = data_of(streams)
    facts = StoreFacts(
        format=FORMAT,
        fingerprint=f"store of {folder.name}",
        tokenizer_fingerprint="t",
        vocab_size=VOCAB,
        eos_token_id=EOS,
        streams=tuple(sorted((count_stream(stream, data, ()) for stream in made), key=lambda counts: counts.name)),
        data={},
    )
    digests: dict[str, str] = {}
    for stream in made:
        digests |= finish_stream(building / "store", stream)
    commit(building / "store", "store.json", facts.to_dict(), digests)
    (building / "store").rename(folder)
    shutil.rmtree(building)


def _blocks(number: int, name: str, splits: tuple[Sequence[Any], Sequence[Any]], size: int) -> list[TokenBlock]:
    """The documents of a stream in blocks of ``size``; a source says the stream and the place in its split."""
    every: list[StoredDocument] = []
    for validation, docs in zip((False, True), splits, strict=True):
        for place, given in enumerate(docs):
            if isinstance(given, StoredDocument):
                every.append(replace(given, validation=validation))
            else:
                tokens, weights = given
                named = {"source": f"{name}#{place}", "meta": json.dumps({"number": place})}
                every.append(stored(tokens, weights=weights, validation=validation, **named))
    chunks = [every[first : first + size] for first in range(0, len(every), size)] or [[]]
    return [make_block(chunk, stream=number, num_bytes=len(chunk)) for chunk in chunks]


def data_of(streams: Sequence[str] | Streams, options: Mapping[str, Mapping[str, Any]] | None = None, **data: Any) -> Data:
    """A data section with these streams; ``options`` has keys of each by name, ``data`` keys of the section."""
    return Data.model_validate(
        {
            "sequence_length": 32,
            "tokenizer": {"kind": "train", "vocab_size": VOCAB},
            "streams": [
                {"name": name, "source": {"kind": "text", "path": name}, **(options or {}).get(name, {})} for name in streams
            ],
            "window_shards": 2,
            **data,
        }
    )


@dataclass(frozen=True)
class Dataset:
    """A store with its row indexes, below the storage root ``root``."""

    root: Path
    card: DatasetCard
    streams: Streams
    seed: int
    data: Data

    @property
    def store(self) -> Path:
        return self.root / self.card.store

    @property
    def index(self) -> Path:
        return self.root / self.card.indexes[0].folder

    def recipe(self, *, rows: int = 7, workers: int = 0, max_rows: int = 0, **changes: Any) -> Recipe:
        """A recipe whose data section is the dataset's; ``changes`` override its top-level sections."""
        recipe = {
            "schema": 1,
            "run": {"name": "test", "seed": self.seed},
            "model": {"kind": "architecture", "family": "llama"},
            "data": self.data.model_dump(mode="json") | {"loader_workers": workers},
            "batch": {"rows": rows},
            "duration": {"steps": 100} if self.data.stages else {"epochs": 1},
            "optimizer": {"kind": "adamw", "learning_rate": 0.1},
            "validation": {"max_rows": max_rows},
        }
        return Recipe.model_validate(recipe | changes)

    def job(
        self, *, rows: int = 7, workers: int = 0, storage: str = "", cache: str = "", max_rows: int = 0, **changes: Any
    ) -> JobSpec:
        return JobSpec(
            recipe=self.recipe(rows=rows, workers=workers, max_rows=max_rows, **changes).to_dict(),
            site={
                "schema": 1,
                "storage": storage or str(self.root),
                "cache": cache or str(self.root / "cache"),
                "monitoring": {"agent": False, "folder": str(self.root / "monitoring")},
            },
            card=self.card,
            run=RunRef(name="test", folder="runs/test", fingerprint="f"),
            workers=1,
            threads_per_worker=1,
            device="cpu",
            launched=time.time(),
        )


def make_dataset(
    root: Path,
    streams: Streams,
    *,
    sequence_length: int = 32,
    window_shards: int = 2,
    seed: int = 5,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    data: Mapping[str, Any] | None = None,
    **store: Any,
) -> Dataset:
    """A dataset with an index for each length that ``data`` uses; ``options`` are keys of the streams, ``data`` of the section,
    ``store`` what ``write_store`` takes."""
    write_store(root / "datasets/s", streams, **store)
    given = {"sequence_length": sequence_length, "window_shards": window_shards, **(data or {})}
    section = data_of(streams, options, **given)
    return Dataset(root, make_card(root, section, seed), streams, seed, section)


def make_card(root: Path, data: Data, seed: int) -> DatasetCard:
    """Build the indexes of the store below ``root`` for ``data``, and describe them."""
    store = root / "datasets/s"
    facts, selection = read_store(store), select(store, data)
    indexes = []
    for length in data.sequence_lengths:
        identity = index_fingerprint(facts.fingerprint, data=data, sequence_length=length, seed=seed)
        index = f"datasets/s/rows-{identity[:16]}"
        made = build_index(store, root / index, data=data, sequence_length=length, seed=seed, selection=selection)
        indexes.append(index_card(index, facts, made))
    return DatasetCard(
        store="datasets/s",
        store_fingerprint=facts.fingerprint,
        tokenizer_fingerprint="t",
        vocab_size=VOCAB,
        eos_token_id=EOS,
        bytes=sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
        indexes=tuple(indexes),
    )


def layout(world: int, rows: int = 7, micro_rows: int = 2) -> Layout:
    per_rank = -(-rows // world)
    return Layout(
        engine="plain",
        world=world,
        replicate=1,
        shard=world,
        global_rows=rows,
        micro_rows=min(micro_rows, per_rank),
        accumulation=-(-per_rank // min(micro_rows, per_rank)),
    )
