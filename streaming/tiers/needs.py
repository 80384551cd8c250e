"""Which optimizer steps read which shard: known before the first step, for the order of all rows is.

A step needs the shards of all its rows, whatever the ranks and nodes that share them. Rows come window by window, and a window
is some neighbouring shards; a *turn* is what one pass of a stream reads of one window. Only the windows around the steps that
are asked for are decoded, and no array is as long as the run, or as a stream has rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import merge
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.recipes.mix import Mix, Phase, taken
from outgrow.streaming.rows import RowIndex, StreamRows
from outgrow.streaming.sampler import StreamOrder
from outgrow.streaming.tiers.shard_list import ShardList

Int64: TypeAlias = npt.NDArray[np.int64]

_TURNS_KEPT = 4
"""Turns of each stream whose visits stay in memory: the one that is read, and where its shards come next."""
_PASSES_KEPT = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Visit:
    """One pass of a stream's order over one shard; where an epoch or stage ends within it, what is left is another visit.

    ``steps`` int64, ascending, never empty: those that read a row of it.
    """

    shard: int
    steps: Int64


class Needs:
    """The visits of a run to its training shards, by their numbers in ``shards``.

    ``indexes`` are opened, in the order of the card that ``mix`` was made of; rows that they have given up need nothing.
    """

    def __init__(self, indexes: Sequence[RowIndex], mix: Mix, seed: int, shards: ShardList) -> None:
        self._mix = mix
        self._ends = shards.ends[: len(mix.streams)].tolist()
        self._readings = [
            [
                _Reading(stream, seed, index.facts.window_shards, shards.documents(number, "train"))
                for number, stream in enumerate(index.streams("train"))
            ]
            for index in indexes
        ]
        self._turn_visits = lru_cache(_TURNS_KEPT * len(mix.streams))(self._visits_of_turn)

    def visits(self, start: int, stop: int) -> Iterator[Visit]:
        """Every visit with a step in [``start``, ``stop``), its steps cut to these, in the order of the first rows they read.

        Lazy. Raises ``IntegrityError`` where the bytes of a window differ from their digest.
        """
        while start < stop:
            phase = self._mix.phase(start)
            end = _end(phase, stop)
            streams = [self._visits_of_stream(phase, stream, start, end) for stream, rows in enumerate(phase.takes) if rows]
            for _, visit in merge(*streams, key=lambda found: found[0]):
                yield visit
            start = end

    def next_step(self, shard: int, after: int, stop: int) -> int | None:
        """The first step > ``after`` and < ``stop`` that reads from ``shard``; None where there is none."""
        return self._next(shard, after, stop, exact=True)

    def latest_step(self, shard: int, after: int, stop: int) -> int | None:
        """A step that ``next_step`` is not after, mostly without decoding a window: the last of its window's next turn.

        None where ``next_step`` is; but a shard that no row reads is taken for one that is read until its window is decoded.
        """
        return self._next(shard, after, stop, exact=False)

    def _next(self, shard: int, after: int, stop: int, *, exact: bool) -> int | None:
        stream = bisect_right(self._ends, shard)
        if stream == len(self._ends):
            return None  # held out: no training step reads it
        own = shard - self._first_shard(stream)
        for phase, turn, is_ahead in self._turns_of(stream, own, after + 1, stop):
            if not exact and turn.is_whole and is_ahead:
                standing = standing_of(phase.takes, stream, turn.end - 1 - phase.starts[stream], 1)
                return int(self._steps_of(phase, standing)[0])
            steps = self._turn_visits(phase, stream, turn).steps.get(shard)
            if steps is not None and steps[-1] > after:
                return int(steps[np.searchsorted(steps, after, "right")])
        return None

    def _turns_of(self, stream: int, own: int, start: int, stop: int) -> Iterator[tuple[Phase, _Turn, bool]]:
        """The turns with a row in steps [``start``, ``stop``) of the window of a stream's shard ``own``, and whether all of the
        turn is still to come at ``start``. A turn is cut by its phase and by ``stop``, not by ``start``."""
        while start < stop:
            phase = self._mix.phase(start)
            end = _end(phase, stop)
            reading, takes = self._readings[phase.index][stream], phase.takes[stream]
            if takes:
                first, now, last = phase.starts[stream], self._place(phase, stream, start), self._place(phase, stream, end)
                number = now // reading.num_rows
                while not reading.is_unread[own]:
                    whole = reading.turn(number, own // reading.window_shards)
                    turn = whole.cut(first, last)
                    if turn.end > max(turn.begin, now):
                        yield phase, turn, turn.begin >= now
                    if whole.end > last:
                        break
                    number += 1
            if self._mix.in_epochs:
                if not takes or reading.is_unread[own]:
                    return
                end = max(end, whole.begin // takes * self._mix.steps_per_epoch)
            start = end

    def _visits_of_stream(self, phase: Phase, stream: int, start: int, end: int) -> Iterator[tuple[int, Visit]]:
        """The visits of one stream in steps [``start``, ``end``) of a phase, in order; see ``_TurnVisits``."""
        place, last = self._place(phase, stream, start), self._place(phase, stream, end)
        while place < last:
            turn = self._readings[phase.index][stream].turn_at(place).cut(place, last)
            yield from self._turn_visits(phase, stream, turn).visits
            place = turn.end

    def _visits_of_turn(self, phase: Phase, stream: int, turn: _Turn) -> _TurnVisits:
        """The visits of a turn that lies in ``phase``, or of a part of one."""
        places, shards = self._readings[phase.index][stream].reads(turn)
        standing = standing_of(phase.takes, stream, turn.begin - phase.starts[stream], turn.end - turn.begin)
        all_steps, number = np.unique(self._steps_of(phase, standing), return_inverse=True)
        found = np.unique(shards * len(all_steps) + number[places])  # every shard with each of its steps, in order
        own, steps = np.divmod(found, len(all_steps))
        begins = np.flatnonzero(np.diff(own, prepend=-1))
        first_shard = self._first_shard(stream)
        parts = np.split(steps, begins)[1:]
        by_shard = {first_shard + shard: all_steps[part] for shard, part in zip(own[begins].tolist(), parts, strict=True)}
        order = [(int(standing[place]), first_shard + shard) for place, shard in _first_reads(places, shards)]
        return _TurnVisits([(at, Visit(shard=shard, steps=by_shard[shard])) for at, shard in order], by_shard)

    def _steps_of(self, phase: Phase, standing: Int64) -> Int64:
        """The steps of the rows that stand at ``standing`` in a phase."""
        steps: Int64 = phase.first_step + standing // self._mix.batch_rows
        return steps

    def _place(self, phase: Phase, stream: int, step: int) -> int:
        """Where a stream stands when ``step`` of a phase, or the step after it, begins."""
        rows = (step - phase.first_step) * self._mix.batch_rows
        if self._mix.in_epochs:
            rows = min(rows, sum(phase.takes))
        return phase.starts[stream] + taken(phase.takes, rows)[stream]

    def _first_shard(self, stream: int) -> int:
        return self._ends[stream - 1] if stream else 0


class _Turn(NamedTuple):
    """What pass ``number`` reads of a window: the places ``begin`` to ``end`` of the stream's sequence of passes."""

    number: int
    window: int
    begin: int
    end: int
    is_whole: bool = True

    def cut(self, begin: int, end: int) -> _Turn:
        """The part of the turn that lies between two places."""
        is_whole = self.is_whole and begin <= self.begin and self.end <= end
        return _Turn(self.number, self.window, max(begin, self.begin), min(end, self.end), is_whole)


class _TurnVisits(NamedTuple):
    """The visits of a turn in order, each with where its first row stands in the phase; and their steps by shard."""

    visits: list[tuple[int, Visit]]
    steps: dict[int, Int64]


class _Reading:
    """Which shards the rows of one stream of one index read, turn by turn; shards are those of the stream, from 0.

    ``documents`` int64 [shards] counts the documents up to and including each shard. ``is_unread`` bool [shards] is set where
    no row reads from a shard, as far as its window has been decoded.
    """

    def __init__(self, stream: StreamRows, seed: int, window_shards: int, documents: Int64) -> None:
        self.num_rows = stream.num_rows
        self.window_shards = window_shards
        self.is_unread = np.repeat(np.diff(stream.window_rows) == 0, window_shards)[: len(documents)]
        self._stream = stream
        self._order = StreamOrder(stream, seed)
        self._documents = documents
        self._turn_of_window = lru_cache(_PASSES_KEPT)(self._turns_by_window)

    def turn_at(self, place: int) -> _Turn:
        """The turn that a place lies in."""
        number, within = divmod(place, self.num_rows)
        windows, ends = self._order.windows(number)
        return self.turn(number, int(windows[np.searchsorted(ends, within, "right")]))

    def turn(self, number: int, window: int) -> _Turn:
        """The turn of a window in pass ``number``."""
        _, ends = self._order.windows(number)
        first, after = self._stream.window_rows[window : window + 2].tolist()
        end = number * self.num_rows + int(ends[self._turn_of_window(number)[window]])
        return _Turn(number, window, end - (after - first), end)

    def reads(self, turn: _Turn) -> tuple[Int64, Int64]:
        """Place of the row and shard of every read of a turn, int64 [reads] each: places count from the turn's beginning, and
        reads of one place are in the order of the row. Neighbouring documents of a row and shard are one read."""
        first = int(self._stream.window_rows[turn.window])
        rows, shards = self._reads_of_window(turn.window)
        begin = self.turn(turn.number, turn.window).begin
        order = self._order.rows(turn.number, turn.window)[turn.begin - begin : turn.end - begin] - first
        place_of_row = np.full(self._stream.window_rows[turn.window + 1] - first, -1)
        place_of_row[order] = np.arange(len(order))
        places = place_of_row[rows]
        if turn.is_whole:
            return places, shards
        return places[places >= 0], shards[places >= 0]

    def _reads_of_window(self, number: int) -> tuple[Int64, Int64]:
        """Row (counted in its window) and shard of every read of a window, in the order of the rows."""
        window = self._stream.window(number)
        first_place = np.searchsorted(window.ends, window.cuts[:-1], "right")
        last_place = np.searchsorted(window.ends, window.cuts[1:], "left")
        counts = np.where(np.diff(window.cuts), last_place - first_place + 1, 0)
        rows = np.repeat(np.arange(window.num_rows), counts)
        places = np.arange(len(rows)) + np.repeat(first_place - (np.cumsum(counts) - counts), counts)
        own = slice(number * self.window_shards, (number + 1) * self.window_shards)
        documents = self._documents[own] - window.first
        shards = own.start + np.searchsorted(documents, window.order.astype(np.int64), "right")[places]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (rows[1:] != rows[:-1]) | (shards[1:] != shards[:-1])
        self.is_unread[own] = True
        self.is_unread[shards] = False
        return rows[is_new], shards[is_new]

    def _turns_by_window(self, number: int) -> Int64:
        """Which turn of pass ``number`` each window has, int64 [windows]."""
        return np.argsort(self._order.windows(number)[0])


def standing_of(takes: Sequence[int], stream: int, first: int, count: int) -> Int64:
    """Where rows ``first`` to ``first`` + ``count`` of a stream stand in ``recipes.mix.merged``, int64 [count].

    The inverse of ``recipes.mix.taken``, exact as that is: row k of n stands at (2 k + 1) / 2 n.
    """
    longest = 2**61 // max(takes)  # all below stays within int64
    if count > longest:
        parts = [standing_of(takes, stream, first + at, min(longest, count - at)) for at in range(0, count, longest)]
        return np.concatenate(parts)
    own, within = takes[stream], np.arange(count)
    standing: Int64 = first + within
    for other, rows in enumerate(takes):
        if rows and other != stream:
            # As many rows of the other come before row k as there are j with (2 j + 1) / rows < (2 k + 1) / own, or with both
            # the same where the other goes first: floor(((2 k + 1) rows - own - tie) / 2 own) + 1.
            tie = other > stream
            whole, rest = divmod((2 * first + 1) * rows - own - tie, 2 * own)
            standing += whole + 1 + (rest + 2 * rows * within) // (2 * own)
    return standing


def _first_reads(places: Int64, shards: Int64) -> list[tuple[int, int]]:
    """Place and shard of the first read of every shard, in order; see ``_Reading.reads``."""
    low = int(shards.min(initial=0))
    first = np.full(int(shards.max(initial=0)) - low + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, shards - low, places)
    earliest = np.flatnonzero(places == first[shards - low])
    own, at = np.unique(shards[earliest], return_index=True)
    order = np.lexsort((earliest[at], first[own - low]))
    return list(zip(first[own - low][order].tolist(), own[order].tolist(), strict=True))


def _end(phase: Phase, stop: int) -> int:
    """The step after the last of a phase, ``stop`` at most."""
    return stop if phase.steps is None else min(phase.first_step + phase.steps, stop)
