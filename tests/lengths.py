"""Lengths of documents as real sources have them, drawn with fixed seeds: what rows are measured on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outgrow.streaming.row_cuts import Borders

Int64 = npt.NDArray[np.int64]


def books(count: int = 60) -> Int64:
    """Few and huge: 120,000 tokens in the middle."""
    return _whole(np.random.default_rng(1).lognormal(np.log(120_000), 0.5, count))


def articles(count: int = 12_000) -> Int64:
    """600 tokens in the middle, and a long tail."""
    return _whole(np.random.default_rng(2).lognormal(np.log(600), 1.0, count))


def scenes(count: int = 70_000) -> Int64:
    """Short: 30 to 200 tokens."""
    return np.random.default_rng(3).integers(30, 201, count)


def dialogues(length: int, count: int = 20_000) -> Int64:
    """Between 0.55 and 0.8 of a row: no two of them share one."""
    return _whole(np.random.default_rng(4).uniform(0.55, 0.8, count) * length)


def mixed(length: int, count: int = 20_000) -> Int64:
    """Anything from a token to a full row, and as many short ones."""
    rng = np.random.default_rng(5)
    return _whole(np.concatenate([rng.uniform(0, 1, count // 2), rng.uniform(0, 0.25, count - count // 2)]) * length)


def lognormal(length: int, count: int = 20_000) -> Int64:
    """A fifth of a row in the middle, and nothing longer than a row."""
    return np.minimum(_whole(np.random.default_rng(6).lognormal(np.log(length / 5), 1.0, count)), length)


def sentences(lengths: Int64, seed: int = 7, mean: int = 22) -> Borders:
    """Borders about every ``mean`` tokens."""
    rng = np.random.default_rng(seed)
    total = int(lengths.sum())
    at = np.cumsum(_whole(rng.lognormal(np.log(mean), 0.6, int(total / mean) + 10)))
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, at[at < total], "right")
    inside = at[at < total] - (ends - lengths)[document]
    document, inside = document[inside > 0], inside[inside > 0]
    return Borders.of(np.bincount(document, minlength=len(lengths)).astype(np.int32), inside.astype(np.int32))


def _whole(lengths: npt.NDArray[np.float64]) -> Int64:
    return np.maximum(lengths, 1).astype(np.int64)
