"""Stores that hold document tables alone, no token: enough to choose documents. Texts are measured as a build does it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.recipes.schema.data import Data
from outgrow.streaming.document_table import DocumentTable
from outgrow.streaming.duplicates import signature
from outgrow.streaming.manifest import commit

Texts = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Held-out and training texts by name of the stream."""


def table(texts: Sequence[str], languages: Sequence[str] | None = None, *, signatures: bool = True) -> DocumentTable:
    count = len(texts)
    keys = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    codes = None
    if languages is not None:
        codes = np.array([list(code.encode().ljust(2, b"\0")) for code in languages], np.uint8).reshape(count, 2)
    return DocumentTable(
        lengths=np.array([len(text) + 1 for text in texts], np.int64),
        shard=np.zeros(count, np.int32),
        weight=np.array([len(text) for text in texts], np.float64),
        uniform=np.ones(count, np.bool_),
        chars=np.array([len(text) for text in texts], np.int64),
        content=np.frombuffer(keys, np.uint64).reshape(count, 2),
        border_counts=np.zeros(count, np.int32),
        borders=np.zeros(0, np.int32),
        language=codes,
        signature=np.array([signature(text) for text in texts], np.uint32).reshape(count, 128) if signatures else None,
    )


def write_texts(folder: Path, texts: Texts, *, part: int = 0, signatures: bool = True) -> Path:
    """A store of ``texts`` in tables of ``part`` documents each, 0 for one table."""
    for name, splits in texts.items():
        for split, own in zip(("validation", "train"), splits, strict=True):
            below = folder / "streams" / name / split
            size = part or max(1, len(own))
            for number, start in enumerate(range(0, len(own), size)):
                table(own[start : start + size], signatures=signatures).save(below, number)
    return finish(folder)


def finish(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    commit(folder, "store.json", {})
    return folder


def data_of(names: Sequence[str], filters: Mapping[str, Any] | None = None, **duplicates: Any) -> Data:
    """The data section of a recipe with streams of these names."""
    streams = [
        {"name": name, "source": {"kind": "text", "path": name}, "filter": (filters or {}).get(name, {})} for name in names
    ]
    return Data.model_validate(
        {
            "sequence_length": 64,
            "tokenizer": {"kind": "train", "vocab_size": 300},
            "streams": streams,
            "duplicates": duplicates,
        }
    )


def jaccard(a: str, b: str) -> float:
    """What two texts have in common of their word 5-grams, the slow and obvious way."""
    return len(_grams(a) & _grams(b)) / len(_grams(a) | _grams(b))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
