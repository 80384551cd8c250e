"""Loss on the held-out documents, per stream and over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from outgrow.contracts import StepRows
from outgrow.trainers.engines import Engine


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """Nats a weighted token: ``total`` over all held-out targets, ``streams`` over those of each stream by itself."""

    total: float
    streams: dict[str, float]


def validate(engine: Engine, batches: Iterable[tuple[str, StepRows]]) -> ValidationLoss | None:
    """The loss of ``batches`` (stream name, rows), equal on all ranks; None where they hold no target.

    Every rank must be given the same streams in the same order with the same number of micro-batches.
    """
    sums: dict[str, torch.Tensor] = {}
    for stream, rows in batches:
        for batch in rows.micro_batches:
            pair = torch.stack(engine.evaluate(batch))
            sums[stream] = sums[stream] + pair if stream in sums else pair
    if not sums:
        return None
    table: list[list[float]] = engine.reduce_sum(torch.stack(list(sums.values()))).tolist()
    nll, weight = map(sum, zip(*table, strict=True))
    if not weight:
        return None
    streams = {stream: n / w for stream, (n, w) in zip(sums, table, strict=True) if w}
    return ValidationLoss(total=nll / weight, streams=streams)
