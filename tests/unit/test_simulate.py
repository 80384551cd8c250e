"""The forecast of a run on a virtual clock: against sums that can be done by hand, and against a clock that ticks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from shard_needs import ListedNeeds, shuffled_windows

from outgrow.streaming.tiers.prefetch import Prefetch
from outgrow.streaming.tiers.room import Room
from outgrow.streaming.tiers.schedule import Fetch, Schedule
from outgrow.streaming.tiers.simulate import Pace, Source, Workload, least_cache, simulate

DISK = Source(name="hdd", bytes_per_s=100.0, latency_s=0.0, parallel=1)


def divided(total: int, *, ahead: int) -> Room:
    return Room(total=total, pinned=0, planned=total - ahead, ahead=ahead, smallest=0)


def workload(needs: ListedNeeds, stop: int, sizes: Sequence[int], *, ahead: int = 0, **changed: Any) -> Workload:
    num_bytes = np.array(sizes, np.int64)
    given = {"windows": np.arange(len(sizes)), "pinned": (), "divide": partial(divided, ahead=ahead), **changed}
    return Workload(needs=needs, num_bytes=num_bytes, stop=stop, **given)


def one_after_another(count: int, **changed: Any) -> Workload:
    """A shard of 100 bytes a step, each read once."""
    return workload(ListedNeeds([(shard, [shard]) for shard in range(count)]), count, [100] * count, **changed)


def test_a_source_that_keeps_up_is_waited_for_once() -> None:
    found = simulate(one_after_another(20), 2000, DISK, Pace(step_s=2.0, ahead_steps=4))
    assert (found.visits, found.misses, found.fetches, found.fetched_bytes) == (20, 20, 20, 2000)
    assert (found.start_s, found.stall_s, found.source_s, found.total_s) == (1.0, 0.0, 20.0, 41.0)
    assert found.load == 0.5


def test_a_source_that_is_too_slow_sets_the_pace() -> None:
    found = simulate(one_after_another(20), 2000, DISK, Pace(step_s=0.5, ahead_steps=4))
    assert (found.start_s, found.stall_s, found.total_s) == (1.0, 9.5, 20.5)
    assert found.load == 2.0 and found.stall_share == 9.5 / 19.5


def test_without_room_to_read_ahead_a_fetch_waits_for_what_it_replaces() -> None:
    """A step has been left once its rows are packed, so a loader that is ahead of the training makes room sooner."""
    needs = ListedNeeds([(shard, [2 * shard, 2 * shard + 1]) for shard in range(10)])
    work, pace = workload(needs, 20, [100] * 10), Pace(step_s=0.5, ahead_steps=0)
    assert simulate(work, 100, DISK, pace).stall_s == 9 * 0.5
    assert simulate(work, 100, DISK, replace(pace, ahead_steps=1)).stall_s == 0.0
    assert simulate(replace(work, divide=partial(divided, ahead=100)), 200, DISK, pace).stall_s == 0.0


def test_without_foresight_the_same_shards_are_fetched_when_a_step_asks() -> None:
    work = one_after_another(20)
    found = simulate(work, 2000, DISK, Pace(step_s=2.0, ahead_steps=0), foresight=False)
    assert (found.start_s, found.stall_s, found.fetches) == (1.0, 19.0, 20)


def test_files_that_are_read_at_once_share_the_bandwidth_and_wait_for_their_first_bytes_together() -> None:
    work = workload(ListedNeeds([(0, [0]), (1, [0])]), 1, [100, 300])
    apart = Source(name="s3", bytes_per_s=100.0, latency_s=2.0, parallel=1)
    assert simulate(work, 400, apart, Pace(step_s=1.0, ahead_steps=0)).start_s == 8.0
    assert simulate(work, 400, replace(apart, parallel=2), Pace(step_s=1.0, ahead_steps=0)).start_s == 6.0
    assert apart.seconds(400, 2) == 8.0


def test_pinned_shards_come_before_the_first() -> None:
    work = replace(one_after_another(5), pinned=(3, 4))
    found = simulate(work, 2000, DISK, Pace(step_s=2.0, ahead_steps=0))
    assert (found.start_s, found.fetches, found.fetched_bytes) == (3.0, 7, 700)


def ticking(work: Workload, cache_bytes: int, source: Source, pace: Pace, tick_s: float) -> tuple[float, float]:
    """``simulate``'s two waits for one file at a time, on a clock that ticks: the slow and obvious way."""
    room = work.divide(cache_bytes)
    schedule = Schedule(work.needs, work.num_bytes, capacity=room.planned, start=0, stop=work.stop, present={})
    state = Prefetch(schedule, work.num_bytes, windows=work.windows, room=room.unpinned, present={}, start=0)
    running: Fetch | None = None
    left = now = computes_until = 0.0
    packed: list[int] = []
    begins: list[float] = []
    to_read = 0
    while len(begins) < work.stop:
        if running is None and (begun := state.begin(parallel=1)):
            running, left = begun[0], source.latency_s + work.num_bytes[begun[0].shard] / source.bytes_per_s
        is_free = now >= computes_until
        room_ahead = is_free and not packed if not pace.ahead_steps else to_read < len(begins) + pace.ahead_steps
        if to_read < work.stop and room_ahead and state.is_ready(to_read):
            packed.append(to_read)
            to_read += 1
            state.advance(to_read)
            continue
        if is_free and packed:
            packed.pop(0)
            begins.append(now)
            computes_until = now + pace.step_s
            continue
        now += tick_s
        if running is not None and (left := left - tick_s) <= 0:
            state.arrived(running)
            running = None
    waits = [begin - before - pace.step_s for before, begin in zip(begins, begins[1:], strict=False)]
    return begins[0], sum(waits)


@pytest.mark.parametrize("seed", range(12))
def test_the_waits_are_those_of_a_clock_that_ticks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    needs, stop = shuffled_windows(seed, windows=5, window_shards=3, passes=2, steps_a_window=8)
    sizes = rng.integers(50, 150, 15).tolist()
    work = workload(needs, stop, sizes, ahead=int(rng.integers(0, 300)), windows=np.arange(15) // 3)
    source = Source(name="hdd", bytes_per_s=100.0, latency_s=float(rng.uniform(0, 0.3)), parallel=1)
    pace = Pace(step_s=float(rng.uniform(0.1, 0.6)), ahead_steps=int(rng.integers(0, 4)))
    cache = int(rng.integers(800, 1400))
    found = simulate(work, cache, source, pace)
    start_s, stall_s = ticking(work, cache, source, pace, 0.002)
    assert found.start_s == pytest.approx(start_s, abs=0.1)
    assert found.stall_s == pytest.approx(stall_s, abs=0.03 * stop)


def test_the_counts_are_those_of_the_plan() -> None:
    needs, stop = shuffled_windows(1, windows=8, window_shards=4, passes=3, steps_a_window=10)
    work = workload(needs, stop, [100] * 32, ahead=400, windows=np.arange(32) // 4)
    found = simulate(work, 1600, DISK, Pace(step_s=0.5, ahead_steps=2))
    plan = Schedule(needs, work.num_bytes, capacity=1200, start=0, stop=stop, present={})
    fetches = list(plan)
    assert (found.fetches, found.through) == (len(fetches), sum(one.through for one in fetches))
    assert (found.visits, found.hits, found.misses) == (plan.counts.visits, plan.counts.hits, plan.counts.misses)
    assert found.visits == found.hits + found.misses == 3 * 32


def test_a_quarter_of_the_data_in_the_cache_hides_a_source_of_which_four_fifths_are_used() -> None:
    needs, stop = shuffled_windows(2, windows=40, window_shards=4, passes=3, steps_a_window=16)
    work = workload(needs, stop, [100] * 160, ahead=800, windows=np.arange(160) // 4)
    pace = Pace(step_s=1.0, ahead_steps=2)
    first = simulate(work, 4000, DISK, pace)
    pace = replace(pace, step_s=first.load / 0.8)
    assert simulate(work, 4000, DISK, pace).stall_share <= 0.02
    assert simulate(work, 4000, DISK, pace, foresight=False).stall_share > 0.2


def test_the_least_cache_that_is_enough_is_found() -> None:
    needs, stop = shuffled_windows(3, windows=20, window_shards=2, passes=6, steps_a_window=8)
    work = workload(needs, stop, [100] * 40, ahead=200, windows=np.arange(40) // 2)
    pace = Pace(step_s=0.22, ahead_steps=2)
    found = least_cache(work, DISK, pace, low=500, high=4000, stall_share=0.1)
    assert found is not None and 500 < found < 4000
    assert simulate(work, found, DISK, pace).stall_share <= 0.1 < simulate(work, found - 150, DISK, pace).stall_share
    assert least_cache(work, DISK, replace(pace, step_s=0.01), low=500, high=4000, stall_share=0.1) is None
