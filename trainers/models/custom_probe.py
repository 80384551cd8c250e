"""Whether a custom model keeps what it must: documents of one row apart, and the future out of sight.

Asked at every start, of the very engine that trains, before it has its weights: of a model of noise, in which every matrix
matters. At birth it may not show, as some models begin with matrices of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from outgrow.contracts import IGNORE_INDEX, Batch
from outgrow.errors import ModelError
from outgrow.trainers.engines.engine import Engine
from outgrow.trainers.models.custom import WHERE
from outgrow.trainers.models.initialise import module_seed
from outgrow.trainers.regions import Region

_LENGTH = 16
_BORDER, _FUTURE = 6, 12
"""Where the second document begins, and where its part begins that what comes before must not see."""


class Noise:
    """A ``TensorSource`` of noise: scores of a model of such parameters tell of every token that they depend on."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Noise for any box, drawn as it is asked for: two boxes that meet do not agree, and nobody minds."""
        generator = torch.Generator().manual_seed(module_seed(0, f"{name}/{region.offset}"))
        width = self._shapes[name][-1] if len(region.shape) > 1 else 1
        return torch.randn(region.shape, generator=generator) / math.sqrt(width)


def check_custom(engine: Engine, shapes: Mapping[str, tuple[int, ...]], vocab_size: int, max_positions: int) -> None:
    """Nothing where the model keeps documents apart and does not see ahead; ``engine`` holds noise afterwards. A collective.

    ``shapes`` are those of the parameters. Raises ``ModelError`` where the scores of a document change with another one of its
    row, or those of a token with the tokens after it: bit-equal is asked for.
    """
    length = min(_LENGTH, max_positions)
    if length < _LENGTH or vocab_size < 2:
        raise ModelError(f"a custom model must have at least {_LENGTH} positions and 2 tokens", where=WHERE)
    engine.load_model(Noise(shapes))
    tokens = torch.arange(_LENGTH).mul(7).remainder(vocab_size)
    changed = {part: tokens.clone() for part in ("first", "future")}
    changed["first"][:_BORDER] = (tokens[:_BORDER] + 1) % vocab_size
    changed["future"][_FUTURE:] = (tokens[_FUTURE:] + 1) % vocab_size
    second, known = range(_BORDER, _LENGTH), range(_BORDER, _FUTURE)
    apart = _loss(engine, tokens, second) == _loss(engine, changed["first"], second)
    blind = _loss(engine, tokens, known) == _loss(engine, changed["future"], known)
    if not apart:
        raise ModelError(
            "it lets a document see another one of the same row: what stands in the first changes the scores of the second",
            where=WHERE,
            hint="mask attention, and all else that mixes tokens, by segments: equal numbers see each other",
        )
    if not blind:
        raise ModelError(
            "it sees ahead: the scores of a token change with the tokens after it",
            where=WHERE,
            hint="mask attention, and all else that mixes tokens, so that a token sees itself and those before it",
        )


def _loss(engine: Engine, tokens: torch.Tensor, counted: range) -> float:
    """The summed loss of ``counted`` positions of a row of two documents; the targets are the same for any tokens."""
    weights = torch.zeros(_LENGTH)
    weights[counted.start : counted.stop] = 1.0
    second = torch.arange(_LENGTH) >= _BORDER
    batch = Batch(
        token_ids=tokens[None],
        targets=torch.where(weights > 0, torch.arange(_LENGTH) % 2, IGNORE_INDEX)[None],
        weights=weights[None],
        segments=second.int()[None],
        positions=(torch.arange(_LENGTH) - _BORDER * second)[None],
        pairs=torch.full((1, _LENGTH), -1, dtype=torch.int32),
        row_ids=torch.full((1,), -1),
    )
    loss = float(engine.evaluate(batch)[0])
    if not math.isfinite(loss):
        raise ModelError(f"its scores are not finite: with small random parameters the loss is {loss}", where=WHERE)
    return loss
