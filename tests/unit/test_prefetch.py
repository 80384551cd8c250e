"""``Prefetch``: what begins when, and that readers always get their step, in the room there is, by the fetches of the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shard_needs import shuffled_windows

from outgrow.streaming.tiers.prefetch import Prefetch
from outgrow.streaming.tiers.schedule import Eviction, Fetch, Schedule


class Listed:
    """A schedule that is given as a list."""

    def __init__(self, fetches: Sequence[Fetch], stop: int = 10**6) -> None:
        self.counts = SimpleNamespace(visits=0)
        self.planned = 0
        self._fetches = list(fetches)
        self._stop = stop

    def next_before(self, step: int) -> Fetch | None:
        step = min(step, self._stop)
        if self._fetches and self._fetches[0].step < step:
            self.planned = self._fetches[0].step
            return self._fetches.pop(0)
        self.planned = step
        return None


def prefetch(fetches: Sequence[Fetch], *, room: int, present: Mapping[int, bool] | None = None, **changed: Any) -> Prefetch:
    """Shards of 10 bytes, four to a window."""
    given = {"windows": np.arange(100) // 4, "start": 0, **changed}
    return Prefetch(Listed(fetches), np.full(100, 10), room=room, present=present or {}, **given)


def fetch(shard: int, step: int, *evict: tuple[int, int], **options: bool) -> Fetch:
    evictions = tuple(Eviction(shard=gone, last_step=last) for gone, last in evict)
    return Fetch(shard=shard, step=step, evict=evictions, **options)


def shards(begun: Sequence[Fetch]) -> list[int]:
    return [one.shard for one in begun]


# --- order ------------------------------------------------------------------------------------------------------------


def test_a_window_is_read_in_the_order_of_its_numbers_and_finished_before_the_next() -> None:
    plan = [fetch(50, 0), fetch(6, 1), fetch(21, 2), fetch(4, 3), fetch(20, 4), fetch(7, 5)]
    state = prefetch(plan, room=1000)
    order = []
    while begun := state.begin(parallel=1):
        order += shards(begun)
        state.arrived(begun[0])
    assert order == [50, 4, 6, 7, 20, 21]


def test_what_the_frontier_waits_for_comes_first() -> None:
    plan = [fetch(0, 0), fetch(1, 5), fetch(2, 5), fetch(40, 1), fetch(3, 5)]
    state = prefetch(sorted(plan, key=lambda one: one.step), room=1000)
    (first,) = state.begin(parallel=1)
    state.arrived(first)
    state.advance(1)
    assert shards(state.begin(parallel=1)) == [40]


def test_no_more_than_parallel_run_at_once() -> None:
    state = prefetch([fetch(number, number) for number in range(10)], room=1000)
    assert shards(state.begin(parallel=3)) == [0, 1, 2]
    assert state.begin(parallel=3) == []
    assert state.queue == 10


def test_a_fetch_that_lacks_room_holds_up_all_after_it() -> None:
    """A smaller one behind it could take the room that it needs, and then neither of two readers would get on."""
    state = prefetch([fetch(0, 0), fetch(1, 0), fetch(2, 3, (0, 2)), fetch(3, 4, (1, 2))], room=20)
    both = state.begin(parallel=4)
    assert shards(both) == [0, 1]
    for one in both:
        state.arrived(one)
    assert state.begin(parallel=4) == []
    state.advance(2)
    assert state.begin(parallel=4) == []
    state.advance(3)
    later = state.begin(parallel=4)
    assert shards(later) == [2, 3] and sorted(e.shard for one in later for e in one.evict) == [0, 1]


def test_room_to_read_ahead_lets_a_fetch_run_while_what_it_replaces_is_read() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 5, (0, 4))], room=20)
    begun = state.begin(parallel=2)
    assert shards(begun) == [0, 1] and begun[1].evict == ()
    assert state.used_bytes == 20


def test_a_shard_that_is_given_up_is_deleted_before_it_is_fetched_again() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 5, (0, 4)), fetch(0, 6, (1, 5))], room=100)
    for one in state.begin(parallel=9):
        state.arrived(one)
    state.advance(4)
    assert state.begin(parallel=9) == []
    state.advance(5)
    (again,) = state.begin(parallel=9)
    assert again.shard == 0 and [gone.shard for gone in again.evict] == [0]


# --- ready ------------------------------------------------------------------------------------------------------------


def test_a_step_is_ready_when_all_that_it_and_earlier_ones_need_is_there() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 2), fetch(2, 2)], room=100)
    one, two, three = state.begin(parallel=9)
    assert not state.is_ready(0)
    state.arrived(three)
    assert not state.is_ready(0) and not state.is_ready(2)
    state.arrived(one)
    assert state.is_ready(0) and state.is_ready(1) and not state.is_ready(2)
    state.arrived(two)
    assert state.is_ready(2) and state.is_ready(3)


def test_a_step_is_not_ready_before_it_is_planned() -> None:
    state = prefetch([], room=100)
    assert state.is_ready(500)
    assert not state.is_ready(10**7)


def test_a_frontier_that_was_reached_is_not_left_again() -> None:
    state = prefetch([fetch(0, 8, (9, 6))], room=10, present={9: True}, start=7)
    assert state.frontier == 7 and state.begin(parallel=1)[0].evict == (Eviction(shard=9, last_step=6),)
    state.advance(9)
    state.advance(8)
    assert state.frontier == 9


def test_a_shard_from_before_is_checked_in_its_place_before_its_step() -> None:
    state = prefetch([fetch(3, 1, check=True), fetch(4, 2)], room=10, present={3: False})
    (check,) = state.begin(parallel=9)
    assert check.check and state.is_ready(0) and not state.is_ready(1)
    assert state.used_bytes == 10
    state.arrived(check)
    assert state.is_ready(1) and state.present() == {3: True}


def test_what_is_read_through_takes_no_room_and_waits_for_its_step() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 2, through=True), fetch(2, 3, (0, 0))], room=10)
    (first,) = state.begin(parallel=9)
    state.arrived(first)
    state.advance(1)
    (third,) = state.begin(parallel=9)
    state.arrived(third)
    assert third.shard == 2 and not state.is_ready(2) and state.used_bytes == 10
    state.advance(2)
    (through,) = state.begin(parallel=9)
    assert through.through
    state.arrived(through)
    assert state.is_ready(2) and state.used_bytes == 10


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_fetch_that_failed_is_given_again_without_its_evictions() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 1, (9, -1))], room=20, present={9: True})
    begun = state.begin(parallel=9)
    assert [gone.shard for one in begun for gone in one.evict] == [9]
    state.failed(begun[1])
    assert state.begin(parallel=9) == [fetch(1, 1)]
    assert state.used_bytes == 20


def test_less_room_gives_up_what_is_read_last_and_keeps_what_is_read_now() -> None:
    needs = {0: 0, 1: 9, 2: 5, 3: None, 4: 7}
    state = prefetch([fetch(number, 0) for number in range(4)], room=50)
    begun = state.begin(parallel=9)
    for one in begun[:3]:
        state.arrived(one)  # 3 is still running
    assert state.shrink(20, needs.get) == [1, 2]
    assert state.present() == {0: True, 3: True} and state.used_bytes == 20
    assert state.shrink(5, needs.get) == []
    state.replan(Listed([fetch(4, 7, (0, 0))]))
    assert not state.is_ready(0)
    state.arrived(begun[3])
    assert state.is_ready(6) and state.begin(parallel=9) == []


def test_present_is_what_lies_on_the_disk_or_is_on_its_way() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 1), fetch(2, 2)], room=20, present={9: False})
    assert state.present() == {9: False}  # 0 and 1 have their room, but have not begun
    state.begin(parallel=1)
    assert state.present() == {9: False, 0: True}


def test_what_was_not_deleted_yet_is_present_for_a_new_plan_but_not_trusted() -> None:
    state = prefetch([fetch(0, 0), fetch(1, 4, (0, 1)), fetch(2, 5, (1, 4))], room=20)
    begun = state.begin(parallel=1)
    state.arrived(begun[0])
    state.advance(2)
    assert state.shrink(20, lambda shard: None) == []
    assert state.present() == {0: False} and state.used_bytes == 10


# --- any run ----------------------------------------------------------------------------------------------------------


class Node:
    """A made-up run: the slot's disk, ranks that read ahead in any order and at any pace, and copies that take any time."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        windows, window_shards = int(rng.integers(2, 7)), int(rng.integers(1, 5))
        count = windows * window_shards
        self.needs, self.stop = shuffled_windows(
            seed, windows=windows, window_shards=window_shards, passes=3, steps_a_window=int(rng.integers(2, 6))
        )
        self.num_bytes = rng.integers(1, 12, count) if rng.random() < 0.7 else np.full(count, 10)
        capacity = int(rng.integers(1, self.num_bytes.sum() + 1))
        self.room = capacity + int(rng.integers(0, 2 * self.num_bytes[:window_shards].sum()))
        start = int(rng.integers(0, self.stop)) if rng.random() < 0.3 else 0
        present: dict[int, bool] = {}
        for shard in rng.permutation(count).tolist() if rng.random() < 0.5 else []:
            if sum(int(self.num_bytes[own]) for own in present) + self.num_bytes[shard] <= self.room:
                present[shard] = bool(rng.random() < 0.5)
        self.plan = {"capacity": capacity, "start": start, "stop": self.stop, "present": present}
        readers, self.ahead, self.parallel = int(rng.integers(1, 4)), int(rng.integers(1, 9)), int(rng.integers(1, 5))
        self.state = Prefetch(
            Schedule(self.needs, self.num_bytes, **self.plan),
            self.num_bytes,
            windows=np.arange(count) // window_shards,
            room=self.room,
            present=present,
            start=start,
        )
        self.todo = [list(range(start, self.stop)) for _ in range(readers)]
        self.reading: list[tuple[int, int]] = []  # reader and step
        self.running: list[Fetch] = []
        self.files, self.through = set(present), set[tuple[int, int]]()
        self.fetched: Counter[tuple[int, int, bool, bool]] = Counter()
        self.has_shrunk = False

    @property
    def in_use(self) -> set[int]:
        return {shard for _, step in self.reading for shard in self.needs.shards(step)}

    def taken(self) -> int:
        copying = {one.shard for one in self.running if not one.through}
        return sum(int(self.num_bytes[shard]) for shard in self.files | copying)

    def begin(self) -> None:
        before = max(self.taken(), self.state.used_bytes)  # more than the room where that has shrunk
        for one in self.state.begin(parallel=self.parallel):
            for gone in one.evict:
                assert self.has_shrunk or gone.shard not in self.in_use
                self.files.remove(gone.shard)
            self.ask_anew()
            assert one.through or one.check == (one.shard in self.files)
            self.running.append(one)
            self.fetched[one.shard, one.step, one.check, one.through] += 1
        assert len(self.running) <= self.parallel
        assert self.taken() <= max(self.room, before)

    def finish(self, one: Fetch) -> None:
        self.running.remove(one)
        if one.through:
            self.through.add((one.shard, one.step))
        else:
            self.files.add(one.shard)
        self.state.arrived(one)

    def acquire(self, reader: int, step: int) -> None:
        assert all(shard in self.files or (shard, step) in self.through for shard in self.needs.shards(step))
        self.todo[reader].remove(step)
        self.reading.append((reader, step))

    def release(self, reader: int, step: int) -> None:
        self.reading.remove((reader, step))
        due = [step for steps in self.todo for step in steps] + [held for _, held in self.reading]
        self.state.advance(min(due, default=self.stop))

    def turn(self) -> None:
        """One thing happens of all that could."""
        self.begin()
        moves: list[tuple[Any, ...]] = [(self.finish, one) for one in self.running]
        moves += [(self.release, *held) for held in self.reading]
        for reader, steps in enumerate(self.todo):
            near = steps[: self.ahead - sum(own == reader for own, _ in self.reading)]
            moves += [(self.acquire, reader, step) for step in near if self.state.is_ready(step)]
        assert moves, "nobody can get on"
        do, *what = moves[int(self.rng.integers(len(moves)))]
        do(*what)

    def ask_anew(self) -> None:
        """A reader that is ahead when the disk shrinks may find a shard gone."""
        for reader, step in self.reading.copy() if self.has_shrunk else ():
            if any(shard not in self.files and (shard, step) not in self.through for shard in self.needs.shards(step)):
                self.reading.remove((reader, step))
                self.todo[reader] = sorted([*self.todo[reader], step])

    @property
    def is_over(self) -> bool:
        return not any(self.todo) and not self.reading

    # --- faults ---

    def fail(self) -> None:
        """A copy comes to nothing."""
        if self.running:
            one = self.running.pop()
            if not one.through:
                self.files.discard(one.shard)
            self.state.failed(one)

    def shrink(self) -> None:
        """Somebody else fills the disk."""
        first = self.state.frontier
        self.room = int(self.room * self.rng.uniform(0.4, 1))
        for shard in self.state.shrink(self.room, lambda own: self.needs.next_step(own, first - 1, self.stop)):
            self.files.remove(shard)
        self.has_shrunk = True
        self.through.clear()
        self.ask_anew()
        present = self.state.present()
        plan = {"capacity": self.room // 2, "start": first, "stop": self.stop, "present": present}
        self.state.replan(Schedule(self.needs, self.num_bytes, **plan))


@pytest.mark.parametrize("seed", range(150))
def test_every_reader_gets_every_step_in_the_room_there_is_by_the_fetches_of_the_plan(seed: int) -> None:
    node = Node(seed)
    while not node.is_over:
        node.turn()
    planned = Schedule(node.needs, node.num_bytes, **node.plan)
    assert node.fetched == Counter((one.shard, one.step, one.check, one.through) for one in planned)


@pytest.mark.parametrize("seed", range(150))
def test_copies_that_fail_and_a_disk_that_shrinks_hold_no_reader_up_for_good(seed: int) -> None:
    node = Node(seed)
    faults = [node.fail, node.shrink]
    while not node.is_over:
        if node.rng.random() < 0.05:
            faults[int(node.rng.integers(2))]()
        node.turn()
