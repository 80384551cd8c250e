"""Recipes and cards of datasets that nobody built: what arithmetic on rows needs, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outgrow.contracts import DatasetCard, IndexCard, StreamCard
from outgrow.recipes.schema import Recipe


def recipe(
    rows: int = 8,
    *,
    length: int = 16,
    streams: Mapping[str, Mapping[str, Any]] | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    duration: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Recipe:
    """A recipe of ``rows`` rows a step; ``streams`` gives keys of each stream by its name."""
    data = {
        "schema": 1,
        "run": {"name": "tiny", "seed": 1},
        "model": {"kind": "architecture", "family": "llama"},
        "data": {
            "sequence_length": length,
            "tokenizer": {"kind": "train", "vocab_size": 300},
            "streams": [
                {"name": name, "source": {"kind": "text", "path": name}, **keys}
                for name, keys in (streams or {"a": {}}).items()
            ],
            "stages": list(stages),
        },
        "batch": {"rows": rows},
        "duration": duration or {"steps": 5},
        "optimizer": {"kind": "adamw", "learning_rate": 0.1},
    }
    return Recipe.model_validate(data | changes)


def index_card(length: int, streams: Mapping[str, tuple[int, int]]) -> IndexCard:
    """An index of rows of ``length`` tokens at most; ``streams`` gives rows and tokens of each."""
    return IndexCard(
        folder=f"datasets/x/rows-{length}",
        fingerprint=f"rows of {length}",
        sequence_length=length,
        streams=tuple(
            StreamCard(
                name=name,
                documents=rows,
                tokens=tokens,
                rows=rows,
                validation_documents=0,
                validation_tokens=0,
                validation_rows=0,
                dropped={},
                source_bytes=4 * tokens,
            )
            for name, (rows, tokens) in streams.items()
        ),
    )


def card(*indexes: IndexCard) -> DatasetCard:
    return DatasetCard(
        store="datasets/x",
        store_fingerprint="s",
        tokenizer_fingerprint="t",
        vocab_size=4096,
        eos_token_id=0,
        bytes=1,
        indexes=indexes,
    )
