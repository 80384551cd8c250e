"""Unigram and bigram against dictionaries and loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from outgrow.streaming.baselines import DISCOUNT, measure


def slow(train: list[tuple[int, int]], validation: list[tuple[int, int]], vocab: int) -> tuple[float, float]:
    ones = Counter(target for _, target in train)
    twos = Counter(train)

    def p1(target: int) -> float:
        return (ones[target] + 1) / (len(train) + vocab)

    def p2(context: int, target: int) -> float:
        total = sum(count for (a, _), count in twos.items() if a == context)
        kinds = sum(1 for (a, _) in twos if a == context)
        if not total:
            return p1(target)
        return (max(twos[context, target] - DISCOUNT, 0) + DISCOUNT * kinds * p1(target)) / total

    nats = [(-math.log(p1(b)), -math.log(p2(a, b))) for a, b in validation]
    return sum(n[0] for n in nats) / len(nats), sum(n[1] for n in nats) / len(nats)


def test_equal_to_the_slow_twin_and_a_distribution() -> None:
    rng = np.random.default_rng(5)
    vocab = 11
    train = rng.integers(0, vocab - 1, (2, 400))
    validation = rng.integers(0, vocab, (2, 90))
    found = measure((train[0], train[1]), (validation[0], validation[1]), vocab, np.full(vocab, 2))
    unigram, bigram = slow(list(zip(*train.tolist(), strict=True)), list(zip(*validation.tolist(), strict=True)), vocab)
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)
    assert found.target_bytes == 180
    assert found.bits_per_byte(math.log(2)) == pytest.approx(0.5)
    every = np.arange(vocab)
    for context in range(vocab):
        one = [
            math.exp(-measure((train[0], train[1]), (np.array([context]), np.array([b])), vocab, np.ones(vocab, int)).bigram)
            for b in every
        ]
        assert sum(one) == pytest.approx(1.0)
