"""What a run of a recipe will find on a site's tiers: opens what the simulation asks for, of the dataset its metadata alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from outgrow.contracts import DataReading, DatasetCard, Layout, Record, Refusal
from outgrow.errors import DataError
from outgrow.recipes.layout import total_steps
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.sizes import parse_size
from outgrow.streaming.fetch import index_folder
from outgrow.streaming.read_ahead import read_ahead_depth
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.steps import ReadPlan
from outgrow.streaming.tiers.needs import Needs
from outgrow.streaming.tiers.places import Place, open_places
from outgrow.streaming.tiers.reading import Reading, open_reading
from outgrow.streaming.tiers.room import Room, number_windows, validation_shards
from outgrow.streaming.tiers.shard_list import ShardList
from outgrow.streaming.tiers.simulate import Forecast, Pace, Source, Workload, least_cache, simulate
from outgrow.streaming.tiers.slot import measured_speeds, slots, tier_space
from outgrow.streaming.tiers.slot_room import choose_room, shown

STALL_SHARE = 0.02
"""A source keeps up where a run waits no more than this share of its time."""
_TRIAL_VISITS = 20_000
"""So much of a run is simulated again and again, to find a cache that is enough."""
_SEEK_S = 0.01
_REQUEST_S = 0.05
"""Before the first byte of a file, of a disk whose speed is given, and of a bucket; a measured speed has it in it."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a forecast is asked for: seconds a step, how many steps (None: all), the cache as a size or a share of the shards
    (``20 GB``, ``25%``; None: what a run gets here), and speeds and seconds before the first byte by tier."""

    step_s: float
    steps: int | None
    cache: str | None
    bytes_per_s: Mapping[str, float]
    latency_s: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Outlook(Record):
    """A forecast and what it is of: ``shards`` and their bytes, the cache on the tier ``hot`` as ``room`` divides it.

    ``prefetched`` is how the run goes, ``on_demand`` how it went without foresight, and ``all_kept`` with a cache for every
    shard; where the source keeps up with that alone, ``enough_bytes`` is about the least cache with which it does, else None.
    """

    shards: int
    shard_bytes: int
    hot: str
    room: Room
    source: Source
    pace: Pace
    prefetched: Forecast
    on_demand: Forecast
    all_kept: Forecast
    enough_bytes: int | None

    @property
    def keeps_up(self) -> bool:
        return self.prefetched.stall_share <= STALL_SHARE


def look_ahead(recipe: Recipe, site: Site, card: DatasetCard, given: Assumptions) -> Outlook:
    """The outlook of a run of ``recipe`` that begins with an empty cache; its dataset's metadata is copied here where it lies
    elsewhere.

    Raises ``DataError`` where the dataset is read in place, the cache is too small to work, or a speed is not known.
    """
    _check_names(given, open_places(site))
    reading = open_reading(site, card)
    hot, holder = _fast_and_slow(reading)
    source = _source(hot, holder, given)
    mix = Mix.of(recipe, card)
    pace = Pace(step_s=given.step_s, ahead_steps=_ahead_steps(recipe, site, mix))
    steps = total_steps(recipe, mix)
    work = _workload(reading, recipe, card, mix, min(steps, given.steps or steps))
    every = int(work.num_bytes.sum())
    cache_bytes = _cache_bytes(hot, given.cache, every, work.divide(0).smallest)
    room = work.divide(cache_bytes)
    room.check("--cache")  # what a run would get is enough, or has been refused
    prefetched = simulate(work, cache_bytes, source, pace)
    all_kept = simulate(work, every, source, pace)
    return Outlook(
        shards=len(work.num_bytes),
        shard_bytes=every,
        hot=hot.name,
        room=room,
        source=source,
        pace=pace,
        prefetched=prefetched,
        on_demand=simulate(work, cache_bytes, source, pace, foresight=False),
        all_kept=all_kept,
        enough_bytes=_enough(work, source, pace, prefetched, low=cache_bytes, high=every),
    )


def foresee_reading(recipe: Recipe, site: Site, card: DatasetCard) -> DataReading:
    """How a run on this node will read its dataset, and why it could not; the metadata is copied here where it lies elsewhere.

    Raises ``DataError`` where no place has the dataset.
    """
    reading = open_reading(site, card)
    if reading.hot is None or reading.hot in reading.holders:
        return DataReading(note=f"the dataset is read where it lies, at {reading.holders[0].name}", refusal=None)
    work = _workload(reading, recipe, card, Mix.of(recipe, card), 0)
    every, smallest = int(work.num_bytes.sum()), work.divide(0).smallest
    holders = ", ".join(place.name for place in reading.holders)
    try:
        room = _cache_bytes(reading.hot, None, every, smallest)
    except DataError as error:
        return DataReading(note="", refusal=Refusal(asked=error.message, available="", nearest=error.hint))
    share = "all of them" if room >= every else f"{room / every:.0%} of them"
    return DataReading(
        note=f"shards are read through {reading.hot.name}, with room for {share} ({shown(room)} of {shown(every)}, at least "
        f"{shown(smallest)}); they lie whole at {holders}",
        refusal=None,
    )


def _workload(reading: Reading, recipe: Recipe, card: DatasetCard, mix: Mix, stop: int) -> Workload:
    indexes = [RowIndex.open(index_folder(reading.store, card, index)) for index in card.indexes]
    shards = ShardList.open(reading.store, mix.streams)
    windows = number_windows(shards, indexes[0].facts.window_shards)
    pinned = validation_shards(indexes[0], shards, recipe.validation.max_rows)
    return Workload(
        needs=Needs(indexes, mix, recipe.run.seed, shards),
        num_bytes=shards.num_bytes,
        windows=windows,
        pinned=pinned,
        stop=stop,
        divide=partial(Room.divide, shards=shards, windows=windows, pinned=pinned),
    )


def _enough(work: Workload, source: Source, pace: Pace, tried: Forecast, *, low: int, high: int) -> int | None:
    """About the least cache above ``low``, which was ``tried``, with which the source keeps up, where that one is too small; of
    a long run only the beginning is looked at."""
    if tried.stall_share <= STALL_SHARE:
        return None
    stop = max(1, work.stop * _TRIAL_VISITS // max(tried.visits, _TRIAL_VISITS))
    return least_cache(work.beginning(stop), source, pace, low=low, high=high, stall_share=STALL_SHARE)


def _check_names(given: Assumptions, places: Sequence[Place]) -> None:
    """Raises ``DataError`` where a speed is given for a tier that the site has not."""
    names = [place.name for place in places]
    for option, values in (("--speed", given.bytes_per_s), ("--latency", given.latency_s)):
        for name in values:
            if name not in names:
                raise DataError(f"there is no tier '{name}'; tiers: {', '.join(names)}", where=option)


def _fast_and_slow(reading: Reading) -> tuple[Place, Place]:
    """The tier that a run reads through, and the place that it fetches from. Raises ``DataError`` where it fetches nothing."""
    if reading.hot is None or reading.hot in reading.holders:
        raise DataError(
            "the dataset is read where it lies: no shard is copied",
            where=str(reading.store),
            hint="to see how it were on a slower disk, list that one in site.yaml under tiers:, after a faster one",
        )
    return reading.hot, reading.holders[0]


def _source(hot: Place, holder: Place, given: Assumptions) -> Source:
    """Raises ``DataError`` where it is not known how fast the holder reads."""
    tier, latency_s = holder.tier, 0.0
    speed = given.bytes_per_s.get(holder.name) or tier.bytes_per_s
    if speed:
        latency_s = _REQUEST_S if tier.is_bucket else _SEEK_S
    else:
        speed = measured_speeds(hot).get(holder.name)
    if not speed:
        raise DataError(
            f"how fast '{holder.name}' reads is not known: no run has read it yet",
            where=tier.path,
            hint=f"--speed '{holder.name}=180 MB/s', or speed: of that tier in site.yaml",
        )
    return Source(
        name=holder.name,
        bytes_per_s=min(speed, tier.limit_bytes_per_s or speed, hot.tier.limit_bytes_per_s or speed),
        latency_s=given.latency_s.get(holder.name, latency_s),
        parallel=tier.num_parallel,
    )


def _cache_bytes(hot: Place, asked: str | None, shard_bytes: int, smallest: int) -> int:
    """Bytes of the cache: those that are asked for, else those that a run would get on the tier now."""
    if asked is not None:
        return round(shard_bytes * float(asked[:-1]) / 100) if asked.endswith("%") else parse_size(asked)
    space = tier_space(hot, slots(hot), own_bytes=0)
    return choose_room(hot.tier, space, dataset_bytes=shard_bytes, smallest=smallest, where=str(hot.folder))


def _ahead_steps(recipe: Recipe, site: Site, mix: Mix) -> int:
    """Steps that a rank's loader workers may be ahead of it: each has read some, and packs one more."""
    world = 1 if site.workers == "auto" else site.workers
    layout = Layout(
        engine="plain",
        world=world,
        replicate=1,
        shard=world,
        global_rows=recipe.batch.rows,
        micro_rows=-(-recipe.batch.rows // world),
        accumulation=1,
    )
    plan = ReadPlan(store="", indexes=(), mix=mix, layout=layout, rank=0, seed=0, fill_token=0)
    return recipe.data.loader_workers * (read_ahead_depth(plan) + 1)
