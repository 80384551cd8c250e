"""What counting alone reaches: unigram and bigram losses of a dataset, to hold a small model's loss against.

Both are fitted on the very tokens that a run consumed and measured on its validation targets, so the three numbers of a
summary (unigram, bigram, model) are of the same text in the same unit: nats a target token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outgrow.contracts import IGNORE_INDEX, Batch

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Input token and target token of every position that predicts, each int64 [n]."""

DISCOUNT = 0.75
"""Absolute discount of the bigram (Ney, Essen and Kneser 1994)."""


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Losses in nats a target token, and how many targets and bytes of text they are over."""

    unigram: float
    bigram: float
    targets: int
    target_bytes: int

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats a token as bits a byte of the text, which does not depend on the tokenizer."""
        return loss * self.targets / (math.log(2.0) * self.target_bytes)


def pairs(batches: Iterable[Batch]) -> Pairs:
    """Every (input, target) that ``batches`` predict; padding and the last tokens of documents left out."""
    inputs, targets = [], []
    for batch in batches:
        valid = batch.targets.numpy() != IGNORE_INDEX
        inputs.append(batch.token_ids.numpy()[valid])
        targets.append(batch.targets.numpy()[valid])
    return np.concatenate(inputs), np.concatenate(targets)


def measure(train: Pairs, validation: Pairs, vocab_size: int, token_bytes: NDArray[np.int64]) -> Baselines:
    """Baselines fitted on ``train``, measured on ``validation``.

    ``token_bytes`` int64 [vocab_size]: bytes of text that each token stands for. The unigram is smoothed by one count a token,
    the bigram gives the mass that absolute discounting frees to the unigram.
    """
    unigram = np.bincount(train[1], minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    keys, counts = np.unique(train[0] * vocab_size + train[1], return_counts=True)
    contexts = keys // vocab_size
    context_total = np.bincount(contexts, weights=counts, minlength=vocab_size)
    context_kinds = np.bincount(contexts, minlength=vocab_size)

    first, second = validation
    found = np.minimum(np.searchsorted(keys, first * vocab_size + second), len(keys) - 1)
    seen = np.where(keys[found] == first * vocab_size + second, counts[found] - DISCOUNT, 0.0)
    total = context_total[first]
    freed = np.where(total > 0, DISCOUNT * context_kinds[first], 1.0)
    bigram = (seen + freed * unigram[second]) / np.maximum(total, 1.0)
    return Baselines(
        unigram=float(-np.log(unigram[second]).mean()),
        bigram=float(-np.log(bigram).mean()),
        targets=len(second),
        target_bytes=int(token_bytes[second].sum()),
    )


def byte_lengths(tokens: list[str], special: frozenset[int]) -> NDArray[np.int64]:
    """Bytes that each token of a byte-level vocabulary stands for (one character a byte); special tokens stand for none."""
    return np.array([0 if number in special else len(token) for number, token in enumerate(tokens)], dtype=np.int64)
