"""Curves of bounded size: what a plot shows of a run of any length. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]

MOST_POINTS = 2_000
"""Points of a curve at most."""


def finite(points: Iterable[tuple[float, float | None]]) -> list[Point]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` of ``points``, in their order: the first, the last, and of each stretch the lowest and the highest.

    A spike of a single step stays to be seen, however long the run is.
    """
    if len(points) <= most:
        return list(points)
    inner = range(1, len(points) - 1)
    stretches = (most - 2) // 2
    kept = [0]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        ends = {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
        kept += sorted(ends)
    return [points[at] for at in (*kept, len(points) - 1)]


def smooth(points: Sequence[Point], share: float = 0.01) -> list[Point]:
    """The running mean whose weights halve every ``share`` of the points, to both sides, so that it lags behind neither."""
    decay = 0.5 ** (1 / max(1.0, share * len(points)))
    values = [y for _, y in points]
    before, after = _decaying_means(values, decay), _decaying_means(values[::-1], decay)[::-1]
    return [(x, (early + late) / 2) for (x, _), early, late in zip(points, before, after, strict=True)]


def _decaying_means(values: Sequence[float], decay: float) -> list[float]:
    """Of each value and those before it; the beginning is not drawn towards zero."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        found.append(mean / weight)
    return found


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What was counted from one record to the next: ``values`` by name, over ``steps`` computed steps and ``seconds``."""

    step: int
    time: float
    seconds: float
    steps: float
    values: dict[str, float] = field(default_factory=dict)

    def __add__(self, later: Interval) -> Interval:
        names = dict.fromkeys([*self.values, *later.values])
        return Interval(
            step=later.step,
            time=later.time,
            seconds=self.seconds + later.seconds,
            steps=self.steps + later.steps,
            values={name: self.values.get(name, 0.0) + later.values.get(name, 0.0) for name in names},
        )


def merge(intervals: Sequence[Interval], most: int) -> list[Interval]:
    """At most ``most`` intervals that add up to the same: neighbours are put together."""
    if len(intervals) <= most:
        return list(intervals)
    bounds = [number * len(intervals) // most for number in range(most + 1)]
    return [_sum(intervals[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _sum(parts: Sequence[Interval]) -> Interval:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def evenly(number: int, most: int) -> Iterator[int]:
    """At most ``most`` places of ``number``, evenly spread, the first and the last among them."""
    if number <= most:
        yield from range(number)
    else:
        yield from sorted({round(at * (number - 1) / (most - 1)) for at in range(most)})
