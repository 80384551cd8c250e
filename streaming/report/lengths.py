"""How long documents are: a histogram with bins of equal ratio, kept in a few kilobytes however many documents there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]

BINS_PER_OCTAVE = 16
_OCTAVES = 32


@dataclass(eq=False)
class Lengths:
    """Documents, and their tokens, by length.

    documents  int64 [B]  documents of 2^(i / 16) up to 2^((i + 1) / 16) tokens; an empty one counts as of length 1
    tokens     int64 [B]  their tokens
    longest    tokens of the longest document
    """

    documents: Int64 = field(default_factory=lambda: np.zeros(_OCTAVES * BINS_PER_OCTAVE, np.int64))
    tokens: Int64 = field(default_factory=lambda: np.zeros(_OCTAVES * BINS_PER_OCTAVE, np.int64))
    longest: int = 0

    def add(self, lengths: Int64) -> None:
        bins = np.floor(np.log2(np.maximum(lengths, 1)) * BINS_PER_OCTAVE + 1e-9).astype(np.int64)
        self.documents += np.bincount(bins, minlength=len(self.documents))
        # Not by bincount's weights, which are floats: tokens are counted exactly.
        np.add.at(self.tokens, bins, lengths)
        self.longest = max(self.longest, int(lengths.max(initial=0)))

    def quantile(self, share: float) -> int:
        """A length that this share of the documents does not exceed, to within 4.4%; 0 where there is none."""
        count = int(self.documents.sum())
        if not count:
            return 0
        place = int(np.searchsorted(np.cumsum(self.documents), share * count))
        return min(self.longest, int(2 ** ((place + 1) / BINS_PER_OCTAVE)))

    def longer_than(self, length: int) -> float:
        """Share of the documents in bins beyond that length; 0 where there is none."""
        count = int(self.documents.sum())
        first = int(np.ceil(np.log2(max(length, 1)) * BINS_PER_OCTAVE))
        return float(self.documents[first:].sum() / count) if count else 0.0

    def coarse(self, per_octave: int = 4) -> tuple[npt.NDArray[np.float64], Int64, Int64]:
        """Edges float64 [C + 1], documents and tokens int64 [C] each, in ``per_octave`` bins an octave, no empty ends."""
        step = BINS_PER_OCTAVE // per_octave
        documents, tokens = (own.reshape(-1, step).sum(axis=1) for own in (self.documents, self.tokens))
        used = np.flatnonzero(documents)
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return 2 ** (np.arange(first, last + 1) / per_octave), documents[first:last], tokens[first:last]
