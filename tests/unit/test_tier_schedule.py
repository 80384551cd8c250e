"""What is fetched for a run: as little as any plan fetches where shards are of one size, and never without its room."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from slow_cache import SlowCache, Steps, furthest, largest_and_furthest, least_bytes, least_recent
from slow_needs import Run
from token_stores import documents, make_dataset

from outgrow.streaming.tiers.needs import Visit
from outgrow.streaming.tiers.schedule import Eviction, Fetch, Schedule

Reads = list[tuple[int, list[int]]]
"""Visits: shard and steps of each, in the order of their first steps."""


class Listed:
    """Needs as they are listed; of a step to come ``latest_step`` says one some steps later."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def visits(self, start: int, stop: int) -> Iterator[Visit]:
        cut = [(shard, [step for step in steps if start <= step < stop]) for shard, steps in self._reads]
        for shard, steps in sorted((read for read in cut if read[1]), key=lambda read: read[1][0]):
            yield Visit(shard=shard, steps=np.array(steps, np.int64))

    def next_step(self, shard: int, after: int, stop: int) -> int | None:
        return min((step for own, steps in self._reads if own == shard for step in steps if after < step < stop), default=None)

    def latest_step(self, shard: int, after: int, stop: int) -> int | None:
        exact = self.next_step(shard, after, stop)
        return None if exact is None else min(exact + (3 * shard + exact) % 7, stop - 1)


@dataclass(frozen=True)
class Case:
    """A made-up run of ``stop`` steps."""

    reads: Reads
    num_bytes: list[int]
    stop: int

    @cached_property
    def steps(self) -> Steps:
        found: list[set[int]] = [set() for _ in range(self.stop)]
        for shard, steps in self.reads:
            for step in steps:
                found[step].add(shard)
        return [frozenset(own) for own in found]

    @property
    def most_at_once(self) -> int:
        """Bytes of the step that reads most."""
        return max(self.bytes_of(needed) for needed in self.steps)

    def bytes_of(self, shards: Iterable[int]) -> int:
        return sum(self.num_bytes[shard] for shard in shards)

    def schedule(self, capacity: int, start: int = 0, present: Mapping[int, bool] | None = None) -> Schedule:
        return Schedule(
            Listed(self.reads),
            np.array(self.num_bytes, np.int64),
            capacity=capacity,
            start=start,
            stop=self.stop,
            present=present or {},
        )


def made_up(seed: int, *, windows: int, window_shards: int = 0, unequal: bool = False, streams: int = 3) -> Case:
    """Some streams in passes over windows of one to three shards (or ``window_shards``), in another order each pass. A shard is
    read in some steps of its window's stretch, and one stretch may end in the step that begins the next. A pass but the first
    may be cut short."""
    draw = random.Random(seed)
    reads: Reads = []
    first_shard, stop = 0, 0
    for _ in range(draw.randint(1, streams)):
        size, count, rate = window_shards or draw.randint(1, 3), draw.randint(2, windows), draw.choice([0.5, 1, 1.7, 3])
        at = 0.0
        for number in range(draw.randint(2, 4)):
            for window in draw.sample(range(count), count if number == 0 else draw.randint(1, count)):
                stretch = range(int(at), int(at + rate) + 1)
                for shard in range(first_shard + window * size, first_shard + (window + 1) * size):
                    reads.append((shard, sorted(draw.sample(stretch, draw.randint(1, len(stretch))))))
                at += rate
        stop = max(stop, int(at) + 2)
        first_shard += count * size
    sizes = [draw.choice([1, 2, 3, 8, 20]) if unequal else 1 for _ in range(first_shard)]
    return Case(joined(reads), sizes, stop)


def joined(reads: Reads) -> Reads:
    """The visits with those of a shard that meet in a step made one."""
    found: Reads = []
    last: dict[int, list[int]] = {}
    for shard, steps in sorted(reads, key=lambda read: read[1][0]):
        if shard in last and last[shard][-1] >= steps[0]:
            last[shard][:] = sorted({*last[shard], *steps})
        else:
            last[shard] = list(steps)
            found.append((shard, last[shard]))
    return found


def fetched_by(case: Case, capacity: int, start: int = 0, present: Mapping[int, bool] | None = None) -> list[int]:
    """The shards that are fetched when a schedule is carried out step by step: each step finds its shards, verified; nothing
    that it needs is given up, or said to be unread since a step that read it; and what is fetched has its room."""
    held = dict(present or {})
    schedule = case.schedule(capacity, start, held)
    fetched: list[int] = []
    last_read: dict[int, int] = {}
    for step in range(start, case.stop):
        needed, read_through = case.steps[step], set[int]()
        while (fetch := schedule.next_before(step + 1)) is not None:
            assert fetch.step == step
            assert fetch.shard in needed
            for eviction in fetch.evict:
                assert eviction == Eviction(shard=eviction.shard, last_step=last_read.get(eviction.shard, start - 1))
                assert eviction.shard not in needed
                del held[eviction.shard]
            if fetch.check:
                assert not held[fetch.shard] and not fetch.evict and not fetch.through
            else:
                assert fetch.shard not in held
                fetched.append(fetch.shard)
            if fetch.through:
                read_through.add(fetch.shard)
                assert not fetch.evict
                assert case.bytes_of([*(held.keys() & needed), fetch.shard]) > capacity
            else:
                held[fetch.shard] = True
                assert fetch.check or case.bytes_of(held) <= capacity
        assert schedule.planned > step
        for shard in needed:
            assert held.get(shard) or shard in read_through
            last_read[shard] = step
    assert schedule.planned == case.stop
    assert next(schedule, None) is None
    counts = schedule.counts
    assert counts.hits + counts.misses == counts.visits
    assert counts.misses == len(fetched)
    assert counts.refetches == len(fetched) - len(set(fetched) - set(present or {}))
    return fetched


@pytest.mark.parametrize("window_shards", [1, 0])
def test_shards_of_one_size_are_fetched_as_rarely_as_by_min(window_shards: int) -> None:
    """Random runs at random capacities, from the beginning and from the middle with shards that lie there from before."""
    refetches = 0
    for seed in range(150):
        case, draw = made_up(seed, windows=12, window_shards=window_shards), random.Random(seed)
        most, shards = case.most_at_once, len(case.num_bytes)
        capacity = draw.randint(most, max(most, 2 * shards // 3))
        fetched = fetched_by(case, capacity)
        assert len(fetched) == len(SlowCache(case.steps, case.num_bytes, capacity).run(furthest).fetched)
        refetches += len(fetched) - len(set(fetched))
        start = draw.randrange(1, case.stop)
        present = dict.fromkeys(draw.sample(range(shards), min(capacity, shards)), True)
        slow = SlowCache(case.steps[start:], case.num_bytes, capacity, set(present)).run(furthest)
        assert len(fetched_by(case, capacity, start, present)) == len(slow.fetched)
    assert refetches > 500


def test_no_plan_fetches_less_of_shards_of_one_size() -> None:
    compared = 0
    for seed in range(200):
        case = made_up(seed, windows=3, window_shards=1, streams=2)
        for capacity in range(case.most_at_once, min(case.most_at_once + 2, len(case.num_bytes))):
            assert len(fetched_by(case, capacity)) == least_bytes(case.steps, case.num_bytes, capacity)
            compared += 1
    assert compared > 100


def test_of_many_sizes_hardly_more_bytes_than_by_a_greedy_that_knows_them_and_less_than_by_lru() -> None:
    total = dict.fromkeys(["ours", "greedy", "lru"], 0)
    for seed in range(200):
        case, draw = made_up(seed, windows=12, unequal=True), random.Random(seed)
        most = case.most_at_once
        capacity = draw.randint(most, max(most, case.bytes_of(range(len(case.num_bytes))) // 2))
        total["ours"] += case.bytes_of(fetched_by(case, capacity))
        for name, choice in (("greedy", largest_and_furthest), ("lru", least_recent)):
            total[name] += SlowCache(case.steps, case.num_bytes, capacity).run(choice).fetched_bytes
    assert total["ours"] <= 1.05 * total["greedy"]
    assert total["ours"] < total["lru"]


@pytest.mark.parametrize("unequal", [False, True])
def test_any_capacity_will_do_and_any_shards_from_before(unequal: bool) -> None:
    """Below what a step reads, the rest of it is read through; what was there may be more than the capacity, or unverified."""
    for seed in range(150):
        case, draw = made_up(seed, windows=6, unequal=unequal), random.Random(seed)
        shards = range(len(case.num_bytes))
        capacity = draw.randint(0, case.most_at_once + 3)
        fetched_by(case, capacity)
        present = {shard: draw.random() < 0.5 for shard in draw.sample(shards, draw.randint(0, len(shards)))}
        fetched_by(case, capacity, draw.randrange(case.stop), present)


def test_a_plan_is_the_same_every_time() -> None:
    for seed in range(20):
        case = made_up(seed, windows=8, unequal=True)
        present = dict.fromkeys(range(0, len(case.num_bytes), 2), False)
        plans = [
            list(case.schedule(2 * case.most_at_once, 3, dict(items))) for items in (present.items(), reversed(present.items()))
        ]
        assert plans[0] == plans[1]


# --- of datasets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_shards", [1, 3])
def test_over_a_dataset_as_few_shards_are_fetched_as_by_min(tmp_path: Path, window_shards: int) -> None:
    """Three epochs of two streams in windows that are shuffled anew; from the first step, and on from one in the midst."""
    streams = {"a": (documents(1, 160), []), "b": (documents(2, 40), [])}
    dataset = make_dataset(tmp_path, streams, window_shards=window_shards, options={"b": {"epochs": 1.5}})
    run = Run.of(dataset, 0)
    run = Run.of(dataset, 3 * run.mix.steps_per_epoch)
    shards, reads = len(run.shards), run.reads()
    sizes = np.ones(shards, np.int64)
    for capacity in (max(map(len, reads)), shards // 2, 3 * shards // 4, shards):
        for start in (0, run.steps // 2):
            present = dict.fromkeys(range(0, min(capacity, shards), 2), True) if start else {}
            made = list(Schedule(run.needs, sizes, capacity=capacity, start=start, stop=run.steps, present=present))
            slow = SlowCache(reads[start:], sizes.tolist(), capacity, set(present)).run(furthest)
            assert len(made) == len(slow.fetched)
            assert not any(fetch.through for fetch in made)


# --- by hand ----------------------------------------------------------------------------------------------------------


def plan(reads: Reads, sizes: Sequence[int], capacity: int, present: Mapping[int, bool] | None = None) -> list[Fetch]:
    stop = max(steps[-1] for _, steps in reads) + 1
    return list(Case(reads, list(sizes), stop).schedule(capacity, 0, present))


def evicted(fetches: Iterable[Fetch]) -> list[tuple[int, list[int]]]:
    """Each shard that is fetched, and what goes for it."""
    return [(fetch.shard, [eviction.shard for eviction in fetch.evict]) for fetch in fetches]


def test_what_is_needed_furthest_goes_and_what_is_never_needed_first() -> None:
    reads = [(0, [0]), (1, [1]), (2, [2]), (3, [3]), (0, [4]), (1, [5])]
    assert evicted(plan(reads, [1] * 5, 3, {4: True})) == [(0, []), (1, []), (2, [4]), (3, [2])]


def test_of_two_that_are_needed_equally_far_the_larger_goes() -> None:
    reads = [(0, [0]), (1, [0]), (2, [1]), (0, [2]), (1, [2])]
    assert evicted(plan(reads, [2, 3, 2], 5))[2] == (2, [1])
    assert evicted(plan(reads, [3, 2, 2], 5))[2] == (2, [0])


def test_what_was_evicted_for_nothing_stays_where_a_larger_one_makes_enough_room() -> None:
    """Furthest first goes 0, which is not enough; then 1, which is enough alone: so 0 stays."""
    reads = [(0, [0]), (1, [0]), (2, [1]), (1, [2]), (0, [3])]
    assert evicted(plan(reads, [1, 4, 3], 5))[2:] == [(2, [1]), (1, [2])]


def test_a_shard_may_go_in_the_midst_of_its_visit_and_comes_back() -> None:
    reads = [(0, [0, 9]), (1, [1, 2]), (1, [3])]
    fetches = plan(reads, [1, 1], 1)
    assert [(fetch.shard, fetch.step) for fetch in fetches] == [(0, 0), (1, 1), (0, 9)]
    assert fetches[1].evict == (Eviction(shard=0, last_step=0),)
    assert fetches[2].evict == (Eviction(shard=1, last_step=3),)


def test_a_shard_whose_visit_rests_for_longer_than_another_is_away_goes_first() -> None:
    reads = [(0, [0, 9]), (1, [0]), (2, [1]), (1, [3])]
    assert evicted(plan(reads, [1] * 3, 2)) == [(0, []), (1, []), (2, [0]), (0, [1])]


def test_a_stream_so_short_that_it_comes_several_times_in_a_step_is_read_through_once() -> None:
    schedule = Case([(0, [0]), (1, [0]), (1, [0]), (1, [0, 1])], [1, 1], 2).schedule(1)
    assert [(fetch.shard, fetch.step, fetch.through) for fetch in schedule] == [(0, 0, False), (1, 0, True), (1, 1, False)]
    assert asdict(schedule.counts) == {"visits": 5, "hits": 2, "misses": 3, "refetches": 1, "evictions": 1}


def test_what_does_not_fit_beside_the_rest_of_its_step_is_read_through_each_time() -> None:
    reads = [(0, [0, 1]), (1, [0, 1, 2])]
    fetches = plan(reads, [1, 1], 1)
    assert [(fetch.shard, fetch.step, fetch.through) for fetch in fetches] == [
        (0, 0, False), (1, 0, True), (1, 1, True), (1, 2, False),
    ]  # fmt: skip


def test_what_turns_out_to_be_read_by_no_row_goes_once_that_is_known() -> None:
    class Unsure(Listed):
        """Of shard 9 it is known in step 5 that no row reads it."""

        def latest_step(self, shard: int, after: int, stop: int) -> int | None:
            return 5 if shard == 9 and after < 5 else super().latest_step(shard, after, stop)

    needs = Unsure([(0, [0]), (1, [1]), (2, [6]), (0, [7]), (1, [8])])
    made = Schedule(needs, np.ones(10, np.int64), capacity=2, start=0, stop=9, present={9: True})
    assert evicted(made) == [(0, []), (1, [0]), (2, [9]), (0, [2])]


def test_a_shard_from_before_is_checked_once_when_it_is_first_needed() -> None:
    fetches = plan([(0, [1, 2]), (1, [2]), (0, [4])], [1, 1], 2, {0: False, 1: True})
    assert fetches == [Fetch(shard=0, step=1, check=True)]


def test_more_from_before_than_there_is_room_for_goes_with_the_first_that_is_missing() -> None:
    fetches = plan([(0, [0]), (5, [1]), (1, [2])], [1] * 6, 2, dict.fromkeys(range(5), True))
    assert len(fetches) == 1
    assert {eviction.shard for eviction in fetches[0].evict} == {0, 2, 3, 4}
    assert {eviction.shard: eviction.last_step for eviction in fetches[0].evict}[0] == 0


def test_what_is_planned_is_told_and_no_further_than_asked_for() -> None:
    case = Case([(0, [0]), (1, [2]), (0, [5]), (1, [6]), (2, [8])], [1] * 3, 10)
    schedule = case.schedule(3)
    assert schedule.planned == 0
    assert schedule.next_before(1) == Fetch(shard=0, step=0)
    assert (schedule.planned, schedule.next_before(2)) == (2, None)
    assert schedule.next_before(7) == Fetch(shard=1, step=2)
    assert (schedule.next_before(7), schedule.planned) == (None, 8)
    assert asdict(schedule.counts) == {"visits": 4, "hits": 2, "misses": 2, "refetches": 0, "evictions": 0}
    assert list(schedule) == [Fetch(shard=2, step=8)]
    assert schedule.planned == 10
