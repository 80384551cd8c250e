"""How much room a slot gets on its tier. Pure: no disk is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outgrow.errors import DataError
from outgrow.recipes.schema.tiers import Tier


@dataclass(frozen=True, kw_only=True)
class Held:
    """A slot that a living process holds: ``room_bytes`` it may take, ``num_bytes`` of which it takes now."""

    name: str
    run: str
    num_bytes: int
    room_bytes: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a tier has for one more slot: ``free_bytes`` of its disk, ``own_bytes`` of shards that lie in the slot from before,
    ``idle_bytes`` in slots that nobody holds, ``placed_bytes`` of whole copies, and the slots ``held``."""

    free_bytes: int
    own_bytes: int
    idle_bytes: int
    placed_bytes: int
    held: Sequence[Held]

    @property
    def promised_bytes(self) -> int:
        """What living slots may still take."""
        return sum(max(0, slot.room_bytes - slot.num_bytes) for slot in self.held)


def left_on_disk(tier: Tier, space: Space) -> int:
    """Bytes that the disk has for the slot, once idle slots are gone."""
    return space.free_bytes + space.own_bytes + space.idle_bytes - space.promised_bytes - tier.reserve_bytes


def left_of_capacity(tier: Tier, space: Space) -> int | None:
    """Bytes that the tier's ``capacity`` leaves for the slot; None where it has none."""
    if tier.capacity_bytes is None:
        return None
    return tier.capacity_bytes - space.placed_bytes - sum(max(slot.room_bytes, slot.num_bytes) for slot in space.held)


def to_free(tier: Tier, space: Space, room_bytes: int) -> int:
    """Bytes of idle slots that must go, for the slot to have its room."""
    short = room_bytes - (left_on_disk(tier, space) - space.idle_bytes)
    capacity = left_of_capacity(tier, space)
    if capacity is not None:
        short = max(short, room_bytes - (capacity - space.idle_bytes))
    return max(0, short)


def choose_room(tier: Tier, space: Space, *, dataset_bytes: int, smallest: int, where: str) -> int:
    """The room of a slot: ``run_cache`` where the site gives it, else the whole dataset, or else half of what is left.

    Never less than ``smallest``. Raises ``DataError`` where there is not that much, with what takes the room and the nearest
    change that helps.
    """
    disk, capacity = left_on_disk(tier, space), left_of_capacity(tier, space)
    left = disk if capacity is None else min(disk, capacity)
    most = tier.run_cache_bytes
    if most is not None and most < smallest:
        raise DataError(
            f"run_cache: of tier '{tier.name}' is {tier.run_cache}; this run reads {shown(smallest)} of shards at once",
            where=where,
            hint=f"the smallest that works: run_cache: {smallest} B; or a smaller data.window_shards",
        )
    if left < smallest:
        raise DataError(
            f"tier '{tier.name}' has {shown(max(0, left))} left; this run reads {shown(smallest)} of shards at once",
            where=where,
            hint="; ".join([*_takers(tier, space), _way_out(tier, disk, capacity, smallest)]),
        )
    wanted = dataset_bytes if most is None else min(most, dataset_bytes)
    return max(smallest, min(wanted, left if most is not None or wanted <= left else left // 2))


def shown(num_bytes: int) -> str:
    """Bytes for a person, in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"


def _takers(tier: Tier, space: Space) -> list[str]:
    """What the room of the tier goes to, in words."""
    words = [f"{shown(slot.room_bytes)} are held by {slot.run or 'a command'} ({slot.name})" for slot in space.held]
    if space.placed_bytes:
        words.append(f"{shown(space.placed_bytes)} are whole copies that outgrow data place made")
    return [*words, f"the disk has {shown(space.free_bytes)} free, and {shown(tier.reserve_bytes)} are reserved"]


def _way_out(tier: Tier, disk: int, capacity: int | None, smallest: int) -> str:
    """The nearest change that helps."""
    unreserved = disk + tier.reserve_bytes
    if disk >= smallest and capacity is not None:
        change = f"with capacity: {(tier.capacity_bytes or 0) + smallest - capacity} B it fits"
    elif unreserved >= smallest and (capacity is None or capacity >= smallest):
        change = f"with reserve: {unreserved - smallest} B it fits"
    else:
        change = "free some of it, or list a tier on a larger disk first"
    return f"{change}; a smaller data.window_shards needs less"
