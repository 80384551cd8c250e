"""Loss on the held-out documents: per stream, and over the streams that are trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from outgrow.contracts import StepRows
from outgrow.recipes.schema.training import TOTAL
from outgrow.trainers.checkpoint.retention import loss_key
from outgrow.trainers.engines import Engine


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """Nats a weighted token: ``streams`` over the held-out targets of each stream by itself, ``total`` over those of all that
    are trained on; None where they have none."""

    total: float | None
    streams: dict[str, float]

    def of(self, metric: str) -> float | None:
        """What a recipe calls ``metric``: ``total``, or a stream by name; None where it was not measured."""
        return self.total if metric == TOTAL else self.streams.get(metric)

    def metrics(self) -> dict[str, float | None]:
        """What a checkpoint keeps, by ``loss_key``."""
        return {loss_key(TOTAL): self.total, **{loss_key(name): loss for name, loss in self.streams.items()}}


def validate(engine: Engine, batches: Iterable[tuple[str, StepRows]], general: Collection[str] = ()) -> ValidationLoss | None:
    """The loss of ``batches`` (stream name, rows), equal on all ranks; None where they hold no target.

    ``general`` names the streams that are not trained on, which are no part of the total.
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
    streams = {stream: n / w for stream, (n, w) in zip(sums, table, strict=True) if w}
    if not streams:
        return None
    trained = [pair for stream, pair in zip(sums, table, strict=True) if stream not in general]
    nll, weight = sum(n for n, _ in trained), sum(w for _, w in trained)
    return ValidationLoss(total=nll / weight if weight else None, streams=streams)
