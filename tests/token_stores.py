"""Token stores of known documents, for tests that read: written with the real writer, committed like a build does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.contracts import DatasetCard, JobSpec, Layout, RunRef
from outgrow.streaming.manifest import commit
from outgrow.streaming.rows import build_index, index_fingerprint

VOCAB = 1000
EOS = 0
Document = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32] | None]
"""Token ids, and the loss weight of each as a target (None: all 1)."""
Streams = Mapping[str, tuple[Sequence[Document], Sequence[Document]]]
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


def write_store(folder: Path, streams: Streams, *, compression: Any = "none", shard_bytes: int = 2000) -> None:
    from outgrow.streaming._mosaic import DocumentWriter  # heavy, and processes that only read do not need it

    for name, splits in streams.items():
        for split, docs in zip(("train", "validation"), splits, strict=True):
            out = folder / "streams" / name / split
            with DocumentWriter(out, vocab_size=VOCAB, compression=compression, shard_bytes=shard_bytes) as writer:
                for number, (tokens, weights) in enumerate(docs):
                    writer.write(tokens, source=f"{name}#{number}", meta={"number": number}, weights=weights)
    commit(folder, "store.json", {"fingerprint": f"store of {folder.name}"})


@dataclass(frozen=True)
class Dataset:
    """A store with one row index, below the storage root ``root``."""

    root: Path
    card: DatasetCard
    streams: Streams
    seed: int

    @property
    def store(self) -> Path:
        return self.root / self.card.store

    @property
    def index(self) -> Path:
        return self.root / self.card.index

    def job(self, *, rows: int = 7, workers: int = 0, storage: str = "", cache: str = "", max_rows: int = 0) -> JobSpec:
        recipe = {
            "schema": 1,
            "run": {"name": "test", "seed": self.seed},
            "model": {"kind": "architecture", "family": "llama"},
            "data": {
                "sequence_length": self.card.sequence_length,
                "tokenizer": {"kind": "train", "vocab_size": VOCAB},
                "streams": [{"name": name, "source": {"kind": "text", "path": name}} for name in self.streams],
                "loader_workers": workers,
            },
            "batch": {"rows": rows},
            "duration": {"epochs": 1},
            "optimizer": {"learning_rate": 0.1},
            "validation": {"max_rows": max_rows},
        }
        return JobSpec(
            recipe=recipe,
            site={"schema": 1, "storage": storage or str(self.root), "cache": cache or str(self.root / "cache")},
            card=self.card,
            run=RunRef(name="test", folder="runs/test", fingerprint="f"),
            workers=1,
            threads_per_worker=1,
            device="cpu",
        )


def make_dataset(
    root: Path, streams: Streams, *, sequence_length: int = 32, window_shards: int = 2, seed: int = 5, **store: Any
) -> Dataset:
    write_store(root / "datasets/s", streams, **store)
    choices = {"sequence_length": sequence_length, "window_shards": window_shards, "seed": seed}
    identity = index_fingerprint("store of s", **choices)
    index = f"datasets/s/rows-{identity[:16]}"
    facts = build_index(root / "datasets/s", root / index, **choices)
    card = DatasetCard(
        store="datasets/s",
        index=index,
        store_fingerprint="store of s",
        index_fingerprint=facts.fingerprint,
        tokenizer_fingerprint="t",
        vocab_size=VOCAB,
        eos_token_id=EOS,
        sequence_length=sequence_length,
        tokens=facts.tokens,
        rows=facts.rows,
        fill=facts.fill,
        validation_rows=facts.validation_rows,
        bytes=sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
        streams=(),
    )
    return Dataset(root, card, streams, seed)


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
