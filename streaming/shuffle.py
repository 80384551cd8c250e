"""Random orders that stay the same for ever: on another machine, and with another numpy.

numpy promises that the raw stream of a bit generator never changes; ``Generator.permutation`` carries no such promise. So an
order is the argsort of raw 64-bit draws.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def sort_keys(count: int, *entropy: int | str, skip: int = 0) -> npt.NDArray[np.uint64]:
    """Draws ``skip`` to ``skip`` + ``count`` of a sequence that depends on ``entropy`` alone, uint64 [count]; sorting by them
    shuffles. Draws that are skipped cost nothing: the generator jumps over them.
    """
    seeds = [item if isinstance(item, int) else _number(item) for item in entropy]
    return np.random.PCG64(np.random.SeedSequence(seeds)).advance(skip).random_raw(count)


def permutation(count: int, *entropy: int | str, skip: int = 0) -> npt.NDArray[np.int64]:
    """0 to ``count`` - 1 in an order that depends on ``entropy`` alone, int64 [count]; see ``sort_keys``."""
    return np.argsort(sort_keys(count, *entropy, skip=skip), kind="stable").astype(np.int64, copy=False)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
