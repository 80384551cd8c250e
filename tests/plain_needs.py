"""Needs of datasets that nobody built, of as many shards as asked for: every window of a stream is like the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets_of_cards import card, index_card, recipe

from outgrow.recipes.mix import Mix
from outgrow.streaming.row_windows import Window
from outgrow.streaming.rows import StreamRows
from outgrow.streaming.tiers.needs import Needs

LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class PlainStream:
    """``shards`` shards of ``documents`` documents each, which lie shuffled in ``rows`` rows a shard; ``keys`` are those of the
    recipe's stream."""

    shards: int
    rows: int
    documents: int
    keys: Mapping[str, Any]

    def open(self, name: str, window_shards: int) -> StreamRows:
        """Its training rows; ``shards`` is a multiple of ``window_shards``."""
        assert self.shards % window_shards == 0, "windows of one size"
        rows, documents = self.rows * window_shards, self.documents * window_shards
        ends = np.arange(1, documents + 1) * 600
        first = Window(
            first=0,
            order=np.random.default_rng(0).permutation(documents).astype(np.uint32),
            starts=np.empty(0, np.uint32),
            ends=ends,
            cuts=np.linspace(0, ends[-1], rows + 1).astype(np.int64),
            weights=np.ones(rows),
        )
        return StreamRows(
            name=name,
            sequence_length=LENGTH,
            window_rows=np.arange(self.shards // window_shards + 1) * rows,
            read=lambda number: replace(first, first=number * documents),
        )


def plain_needs(streams: Sequence[PlainStream], *, window_shards: int, batch_rows: int) -> tuple[Needs, Mix]:
    """What a run over the streams needs, and which rows it takes."""
    rows = [stream.open(f"s{number}", window_shards) for number, stream in enumerate(streams)]
    index: Any = SimpleNamespace(streams=lambda split: rows, facts=SimpleNamespace(window_shards=window_shards))
    documents = [np.arange(1, stream.shards + 1) * stream.documents for stream in streams]
    ends = np.cumsum([stream.shards for stream in streams])
    shards: Any = SimpleNamespace(ends=ends, documents=lambda stream, split: documents[stream])
    keys = {own.name: stream.keys for own, stream in zip(rows, streams, strict=True)}
    sizes = {own.name: (own.num_rows, own.num_rows * LENGTH) for own in rows}
    mix = Mix.of(recipe(batch_rows, length=LENGTH, streams=keys), card(index_card(LENGTH, sizes)))
    return Needs([index], mix, 3, shards), mix
