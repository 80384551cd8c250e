"""Packed rows made by a seeded generator, for tests that need batches without a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outgrow.contracts import IGNORE_INDEX, Batch

Document = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""token_ids int64 [n], targets int64 [n], weights float32 [n]."""
Row = list[Document]


def document(generator: torch.Generator, length: int, vocab: int) -> Document:
    """A document whose tokens follow each other with some regularity, so that there is something to learn."""
    steps = torch.randint(1, 4, (length + 1,), generator=generator)
    tokens = (torch.randint(vocab, (1,), generator=generator) + steps.cumsum(0)) % vocab
    weights = torch.rand(length, generator=generator) * (torch.rand(length, generator=generator) > 0.1)
    targets = tokens[1:].clone()
    if torch.rand((), generator=generator) < 0.7:
        targets[-1], weights[-1] = IGNORE_INDEX, 0.0
    return tokens[:-1], targets, weights


def row(generator: torch.Generator, length: int, vocab: int) -> Row:
    """Documents that fill most of ``length``; what is left is padding."""
    documents, left = [], length - int(torch.randint(0, 4, (), generator=generator))
    while left > 1:
        size = min(left, int(torch.randint(2, length, (), generator=generator)))
        documents.append(document(generator, size, vocab))
        left -= size
    return documents


def corpus(seed: int, *, steps: int, rows: int, length: int, vocab: int) -> list[list[Row]]:
    """Rows of every step. Every seventh step is three rows short, as the last one of an epoch may be."""
    generator = torch.Generator().manual_seed(seed)
    return [[row(generator, length, vocab) for _ in range(rows - 3 if step % 7 == 6 else rows)] for step in range(steps)]


def unweighted(rows: Sequence[Row]) -> list[Row]:
    """The same rows with weight 1 for every target."""
    return [[(tokens, targets, (targets != IGNORE_INDEX).float()) for tokens, targets, _ in documents] for documents in rows]


def batch(rows: Sequence[Row], length: int) -> Batch:
    """The rows as one micro-batch; without rows, the zero-weight row that the loader gives."""
    count = max(len(rows), 1)
    token_ids = torch.zeros(count, length, dtype=torch.int64)
    targets = torch.full((count, length), IGNORE_INDEX)
    weights = torch.zeros(count, length)
    segments = torch.full((count, length), -1, dtype=torch.int32)
    positions = torch.zeros(count, length, dtype=torch.int64)
    for i, documents in enumerate(rows):
        start = 0
        for number, (tokens, wanted, weight) in enumerate(documents):
            part = slice(start, start + len(tokens))
            token_ids[i, part], targets[i, part], weights[i, part] = tokens, wanted, weight
            segments[i, part], positions[i, part] = number, torch.arange(len(tokens))
            start += len(tokens)
    return Batch(
        token_ids=token_ids,
        targets=targets,
        weights=weights,
        segments=segments,
        positions=positions,
        pairs=torch.full((count, length), -1, dtype=torch.int32),
        row_ids=torch.arange(count) if rows else torch.full((1,), -1),
    )


def global_weight(rows: Sequence[Row]) -> float:
    """The sum of all loss weights of a step."""
    return sum(float(weights.double().sum()) for documents in rows for _, _, weights in documents)
