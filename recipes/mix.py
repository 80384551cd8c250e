"""Which rows of which stream each step takes: epochs, shares and stages as integer arithmetic of a recipe and a dataset's card.

A stream is an endless sequence of passes, each of which holds every row of it once; a *place* counts the rows from the
beginning of that sequence. The order within a pass is the sampler's affair. What is worked out here is how many rows of each
stream have come before a step, in closed form: nothing is kept, any step can be asked for, and none takes longer than another.

The streams of a phase are merged by how far along each is: row k of a stream that gives n rows of the phase stands at
(2 k + 1) / 2 n, so every batch, and every other stretch, has the mix of the whole to within a row or two of each stream. These
places are compared as integers over a common denominator, not as floats: the order is exact, ties go to the stream that comes
first, and every machine finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Self

from outgrow import storage
from outgrow.contracts import DatasetCard, IndexCard, Record, StreamCard
from outgrow.errors import PlanError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.data import Stage
from outgrow.recipes.schema.streams import Stream

_RATE_SUM = 2**40
"""What the takes of a stage add up to: shares are met to 1e-12, and a stage as long as that has yet to be run."""


@dataclass(frozen=True, kw_only=True)
class Phase(Record):
    """A part of the run with one mix of streams and one length of rows: an epoch, or a stage.

    index            number of its row index in ``DatasetCard.indexes``
    sequence_length  tokens a row of that index
    epoch            number of the epoch; 0 in a stage
    first_step       its first optimizer step
    steps            how many it has, None where it lasts to the end of the run
    takes            rows of each stream: of a whole epoch; in a stage in proportion, 2**40 together
    starts           place of each stream at the first step, in rows of the index
    """

    index: int
    sequence_length: int
    epoch: int
    first_step: int
    steps: int | None
    takes: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Mix(Record):
    """The rows of every step of a run. ``streams`` are in the order of the card, which is that of the row indexes.

    With ``in_epochs`` there is one phase, the first epoch, and each later one goes on where the one before ended; else the
    phases are the stages.
    """

    batch_rows: int
    streams: tuple[str, ...]
    in_epochs: bool
    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, recipe: Recipe, card: DatasetCard) -> Self:
        """The mix that ``recipe`` asks for. Raises ``PlanError`` where a share is asked of a stream that has no row."""
        if not card.rows:
            raise PlanError("the dataset has no row to train on", hint="lower data.sequence_length, or give more text")
        return cls(
            batch_rows=recipe.batch.rows,
            streams=tuple(stream.name for stream in card.streams),
            in_epochs=not recipe.data.stages,
            phases=_stages(recipe, card) if recipe.data.stages else (_first_epoch(recipe, card),),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, of which the last takes the rows that are left and may be short; 0 in stages."""
        return self.phases[0].steps or 0 if self.in_epochs else 0

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the rows of a step, but for the rows themselves."""
        return storage.fingerprint(self.to_dict())

    def phase(self, step: int) -> Phase:
        """The epoch or stage that optimizer step ``step`` (from 0) belongs to."""
        if not self.in_epochs:
            return next(phase for phase in reversed(self.phases) if phase.first_step <= step)
        first = self.phases[0]
        epoch = step // self.steps_per_epoch
        starts = tuple(epoch * rows for rows in first.takes)
        return replace(first, epoch=epoch, first_step=epoch * self.steps_per_epoch, starts=starts)

    def rows(self, step: int) -> list[tuple[int, int]]:
        """The rows of a step in order, each as the number of its stream and its place in that stream's sequence of passes."""
        phase = self.phase(step)
        start = (step - phase.first_step) * self.batch_rows
        stop = start + self.batch_rows
        if self.in_epochs:
            stop = min(stop, sum(phase.takes))
        return [(stream, phase.starts[stream] + row) for stream, row in merged(phase.takes, start, stop)]

    def drawn(self, steps: int) -> list[tuple[Phase, tuple[int, ...]]]:
        """Rows of each stream that the first ``steps`` steps take, stage by stage; of a run in epochs all at once."""
        if self.in_epochs:
            first = self.phases[0]
            epochs, rest = divmod(steps, self.steps_per_epoch)
            begun = taken(first.takes, min(rest * self.batch_rows, sum(first.takes)))
            return [(first, tuple(epochs * whole + part for whole, part in zip(first.takes, begun, strict=True)))]
        return [
            (phase, taken(phase.takes, min(steps - phase.first_step, phase.steps or steps) * self.batch_rows))
            for phase in self.phases
            if phase.first_step < steps
        ]


def stage_lengths(recipe: Recipe) -> list[tuple[int | None, int]]:
    """Optimizer steps and tokens a row of each stage, the last one's steps None; without stages, of the run as a whole."""
    lengths = []
    for stage in recipe.data.stages or (None,):
        length = (stage.sequence_length if stage else None) or recipe.data.sequence_length
        tokens = stage.tokens if stage else None
        lengths.append((tokens and math.ceil(Fraction(tokens, recipe.batch.rows * length)), length))
    return lengths


# --- merging ----------------------------------------------------------------------------------------------------------


def taken(takes: Sequence[int], rows: int) -> tuple[int, ...]:
    """How many of the first ``rows`` rows of the merged streams each stream gives, in time that depends on neither.

    ``takes`` are the rows that each stream gives of ``sum(takes)``; the merged sequence goes on for ever.
    """
    whole, scales = sum(takes), _scales(tuple(takes))
    # All rows that stand at rows / whole or before: as many as are asked for, but for half a row a stream.
    counts = [(2 * own * rows + whole) // (2 * whole) for own in takes]
    streams = [stream for stream, own in enumerate(takes) if own]
    for _ in range(sum(counts) - rows):
        last = max((s for s in streams if counts[s]), key=lambda s: ((2 * counts[s] - 1) * scales[s], s))
        counts[last] -= 1
    for _ in range(rows - sum(counts)):
        first = min(streams, key=lambda s: ((2 * counts[s] + 1) * scales[s], s))
        counts[first] += 1
    return tuple(counts)


def merged(takes: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Rows ``start`` to ``stop`` (exclusive) of the merged streams: number of the stream, and of the row within it."""
    scales = _scales(tuple(takes))
    before, after = taken(takes, start), taken(takes, stop)
    standing = [
        ((2 * row + 1) * scales[stream], stream, row)
        for stream in range(len(takes))
        for row in range(before[stream], after[stream])
    ]
    return [(stream, row) for _, stream, row in sorted(standing)]


@lru_cache(maxsize=64)
def _scales(takes: tuple[int, ...]) -> tuple[int, ...]:
    """What turns (2 k + 1) / n of each stream into integers that can be compared; 0 for a stream that gives none."""
    common = math.lcm(*(own for own in takes if own))
    return tuple(common // own if own else 0 for own in takes)


# --- epochs -----------------------------------------------------------------------------------------------------------


def _first_epoch(recipe: Recipe, card: DatasetCard) -> Phase:
    by_name = {stream.name: stream for stream in recipe.data.streams}
    takes = _epoch_takes([by_name[stream.name] for stream in card.streams], card.streams)
    return Phase(
        index=0,
        sequence_length=card.sequence_length,
        epoch=0,
        first_step=0,
        steps=math.ceil(Fraction(sum(takes), recipe.batch.rows)),
        takes=takes,
        starts=(0,) * len(takes),
    )


def _epoch_takes(streams: Sequence[Stream], cards: Sequence[StreamCard]) -> tuple[int, ...]:
    """Rows of each stream in one epoch, none of one for validation; tokens of a share are turned into rows by the stream's mean
    tokens a row."""
    for stream, card in zip(streams, cards, strict=True):
        if stream.share is not None:
            _require_rows(card, f"stream '{stream.name}' of data.streams has share: {stream.share:g}")
    takes = [
        _at_least_one(_exact(stream.epochs or 1) * card.rows) if card.rows and stream.share is None else 0
        for stream, card in zip(streams, cards, strict=True)
    ]
    shares = [_exact(stream.share or 0) for stream in streams]
    all_shared = all(stream.share is not None for stream in streams if stream.use == "training")
    tokens = sum((rows * _mean_tokens(card) for rows, card in zip(takes, cards, strict=True) if rows), Fraction(0))
    whole = Fraction(sum(card.tokens for card in cards)) if all_shared else tokens / (1 - sum(shares))
    if not whole:
        raise PlanError(
            "the streams of data.streams without share have no row to train on; the others would be shares of nothing",
            hint="give every stream a share, or those without one more text",
        )
    return tuple(
        _at_least_one(share * whole / _mean_tokens(card)) if share else rows
        for rows, share, card in zip(takes, shares, cards, strict=True)
    )


# --- stages -----------------------------------------------------------------------------------------------------------


def _stages(recipe: Recipe, card: DatasetCard) -> tuple[Phase, ...]:
    numbers = {index.sequence_length: number for number, index in enumerate(card.indexes)}
    phases: list[Phase] = []
    first_step = 0
    for number, (stage, (steps, length)) in enumerate(zip(recipe.data.stages, stage_lengths(recipe), strict=True)):
        index = card.indexes[numbers[length]]
        phases.append(
            Phase(
                index=numbers[length],
                sequence_length=length,
                epoch=0,
                first_step=first_step,
                steps=steps,
                takes=_stage_takes(stage, number, index),
                starts=_places_after(phases[-1], recipe.batch.rows, card, index) if phases else (0,) * len(index.streams),
            )
        )
        first_step += steps or 0
    return tuple(phases)


def _stage_takes(stage: Stage, number: int, index: IndexCard) -> tuple[int, ...]:
    """Rows of each stream in proportion: as many tokens of each as its share says, by the index's mean tokens a row."""
    rates = []
    for stream in index.streams:
        share = stage.shares.get(stream.name, 0)
        if share:
            _require_rows(stream, f"data.stages[{number}].shares.{stream.name} is {share:g}")
        rates.append(_exact(share) / _mean_tokens(stream) if share else Fraction(0))
    return tuple(_at_least_one(_RATE_SUM * rate / sum(rates)) if rate else 0 for rate in rates)


def _places_after(phase: Phase, batch_rows: int, card: DatasetCard, index: IndexCard) -> tuple[int, ...]:
    """Where the stage after ``phase`` finds each stream: where this one leaves it, in rows of the new stage's index.

    As many passes have gone by in either; a part of a row counts as read. The windows of an index are those of the store,
    whatever the length of its rows, and come in the same order: so a stream goes on in the window where it was. Within it a
    shuffled stream does not: its rows come in another order in each index, so of that one window some tokens come twice in
    this pass, and some not at all.
    """
    assert phase.steps is not None, "a stage that another follows has an end"
    drawn = taken(phase.takes, phase.steps * batch_rows)
    places = [start + rows for start, rows in zip(phase.starts, drawn, strict=True)]
    before = card.indexes[phase.index]
    if before.fingerprint == index.fingerprint:
        return tuple(places)
    return tuple(
        math.ceil(Fraction(place * new.rows, old.rows)) if old.rows else 0
        for place, old, new in zip(places, before.streams, index.streams, strict=True)
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def _mean_tokens(stream: StreamCard) -> Fraction:
    """Tokens a row."""
    return Fraction(stream.tokens, stream.rows)


def _exact(figure: float) -> Fraction:
    """A figure as it is written: 0.1 is a tenth, which the float is not."""
    return Fraction(Decimal(str(figure)))


def _at_least_one(rows: Fraction) -> int:
    """Whole rows; a stream that was asked for is never rounded away."""
    return max(1, round(rows))


def _require_rows(stream: StreamCard, asked: str) -> None:
    if not stream.rows:
        raise PlanError(
            f"{asked}, but the stream has no row to train on",
            hint="give it more text, or take it out of the mix",
        )
