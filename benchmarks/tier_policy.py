"""What the schedule fetches, against offline MIN, a greedy that knows all sizes, LRU, and the least that any plan can fetch.

    python benchmarks/tier_policy.py

No byte of data is moved: what made-up datasets need is worked out as for a real one, from the order of their rows. Then the
time that planning takes with a hundred thousand shards.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from plain_needs import PlainStream, plain_needs  # noqa: E402
from slow_cache import Choice, SlowCache, Steps, furthest, largest_and_furthest, least_bytes, least_recent  # noqa: E402

from outgrow.streaming.tiers.needs import Needs, Visit  # noqa: E402
from outgrow.streaming.tiers.schedule import Schedule  # noqa: E402

MB = 10**6
SHARES = (0.10, 0.25, 0.50)
"""Sizes of the cache, as shares of the data."""
EPOCHS = 3
ONE = [PlainStream(shards=1008, rows=160, documents=480, keys={})]
TWO = [
    PlainStream(shards=720, rows=160, documents=480, keys={}),
    PlainStream(shards=288, rows=160, documents=480, keys={"share": 0.3}),
]
CASES = {
    "one stream, windows of 1 shard": (ONE, 1),
    "one stream, windows of 16 shards": (ONE, 16),
    "two streams, 30% from the smaller, windows of 16": (TWO, 16),
}


@dataclass(frozen=True)
class Case:
    """A run of ``stop`` steps and the sizes of its shards."""

    needs: Needs
    steps: Steps
    num_bytes: npt.NDArray[np.int64]
    stop: int

    def planned(self, capacity: int) -> tuple[int, int]:
        """Fetches and their bytes."""
        made = Schedule(self.needs, self.num_bytes, capacity=capacity, start=0, stop=self.stop, present={})
        shards = [fetch.shard for fetch in made]
        return len(shards), int(self.num_bytes[shards].sum())

    def of_twin(self, capacity: int, choice: Choice) -> tuple[int, int]:
        cache = SlowCache(self.steps, self.num_bytes.tolist(), capacity).run(choice)
        return len(cache.fetched), cache.fetched_bytes


def reads(visits: Iterable[Visit], stop: int) -> Steps:
    """The shards that each step reads."""
    found: list[set[int]] = [set() for _ in range(stop)]
    for visit in visits:
        for step in visit.steps.tolist():
            found[step].add(visit.shard)
    return [frozenset(own) for own in found]


def sizes(count: int, *, equal: bool) -> npt.NDArray[np.int64]:
    """Bytes of each shard: 64 MB, or lognormal around that (sigma 0.6), from 3 to 400 MB or so."""
    if equal:
        return np.full(count, 64 * MB)
    return (64 * MB * np.random.default_rng(1).lognormal(0, 0.6, count)).astype(np.int64)


def compare(streams: Sequence[PlainStream], window_shards: int) -> None:
    needs, mix = plain_needs(streams, window_shards=window_shards, batch_rows=64)
    stop = EPOCHS * mix.steps_per_epoch
    steps = reads(needs.visits(0, stop), stop)
    count = sum(stream.shards for stream in streams)
    same, other = (Case(needs, steps, sizes(count, equal=equal), stop) for equal in (True, False))
    window = len(streams) * window_shards * 64 * MB
    for share in SHARES:
        cells = [*of_one_size(same, share, window), *of_many_sizes(other, share)]
        print(f"| {share:.0%} | " + " | ".join(cells) + " |", flush=True)


def of_one_size(case: Case, share: float, window: int) -> list[str]:
    capacity = int(share * case.num_bytes.sum())
    ahead = min(max(window, min(capacity // 4, 2 * window)), capacity - window)
    least, lru = case.of_twin(capacity, furthest)[0], case.of_twin(capacity, least_recent)[0]
    fetches, beside = case.planned(capacity)[0], case.planned(capacity - ahead)[0]
    return [f"{fetches:,}", f"{least:,}", f"{lru:,}", f"{ahead // (64 * MB)}", f"{beside / least:.3f}"]


def of_many_sizes(case: Case, share: float) -> list[str]:
    capacity = int(share * case.num_bytes.sum())
    num_bytes = case.planned(capacity)[1]
    greedy, lru = case.of_twin(capacity, largest_and_furthest)[1], case.of_twin(capacity, least_recent)[1]
    return [f"{num_bytes / 10**9:.1f}", f"{num_bytes / greedy:.3f}", f"{num_bytes / lru:.3f}"]


def against_the_least(cases: int) -> None:
    """Small random runs of shards of many sizes, where every plan can be tried."""
    ours, greedy, least = [], [], []
    for seed in range(cases):
        draw = random.Random(seed)
        streams = [
            PlainStream(shards=draw.choice([4, 6]), rows=6, documents=18, keys={}) for _ in range(draw.choice([1, 1, 2]))
        ]
        needs, mix = plain_needs(streams, window_shards=draw.choice([1, 2]), batch_rows=4)
        stop = EPOCHS * mix.steps_per_epoch
        steps = reads(needs.visits(0, stop), stop)
        num_bytes = np.array([draw.choice([1, 2, 3, 8, 20]) for _ in range(sum(stream.shards for stream in streams))])
        most = max(int(num_bytes[list(needed)].sum()) for needed in steps)
        case = Case(needs, steps, num_bytes, stop)
        capacity = draw.randint(most, max(most, int(num_bytes.sum()) - 1))
        ours.append(case.planned(capacity)[1])
        greedy.append(case.of_twin(capacity, largest_and_furthest)[1])
        least.append(least_bytes(steps, num_bytes.tolist(), capacity))
    for name, made in (("the schedule", ours), ("the greedy", greedy)):
        ratios = np.array(made) / least
        print(
            f"{cases} small runs: {name} fetches {sum(made) / sum(least):.3f} of the least bytes that any plan does, "
            f"{ratios.max():.2f} in the worst run, and no more in {(ratios == 1).sum()} runs"
        )
    worst = (np.array(ours) / greedy).max()
    print(
        f"The schedule fetches {sum(ours) / sum(greedy):.3f} of what the greedy does, {worst:.2f} in the worst run", flush=True
    )


def planning(window_shards: int, rows: int, documents: int, visits: int) -> None:
    """Time of planning a visit with a hundred thousand shards and a cache of a quarter of them, when it is full from before."""
    count = 100_000
    stream = PlainStream(shards=count, rows=rows, documents=documents, keys={})
    needs, mix = plain_needs([stream], window_shards=window_shards, batch_rows=512)
    num_bytes = sizes(count, equal=True)
    start = mix.steps_per_epoch // 2
    present = dict.fromkeys(range(count // 4), True)
    started = time.process_time()
    schedule = Schedule(
        needs,
        num_bytes,
        capacity=int(num_bytes[: count // 4].sum()),
        start=start,
        stop=EPOCHS * mix.steps_per_epoch,
        present=present,
    )
    next(schedule)
    first = time.process_time() - started
    before = schedule.counts.visits
    started = time.process_time()
    while schedule.counts.visits < before + visits:
        next(schedule)
    a_visit = (time.process_time() - started) / (schedule.counts.visits - before)
    print(f"| {window_shards} | {rows:,} | {documents:,} | {first:.2f} | {a_visit * 1e3:.2f} |", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}")
    for name, (streams, window_shards) in CASES.items():
        print(f"\n{name}\n")
        print(
            "| cache | fetches | MIN | LRU | read-ahead, shards | fetches with it / MIN | GB of many sizes | / greedy | / LRU |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        compare(streams, window_shards)
    print()
    against_the_least(300)
    print("\n| shards a window | rows a shard | documents a shard | first fetch of a full cache, s | planning a visit, ms |")
    print("|---|---|---|---|---|")
    planning(16, 10_040, 34_135, 320)
    planning(16, 100, 341, 4_000)
    planning(1, 100, 341, 4_000)


if __name__ == "__main__":
    main()
