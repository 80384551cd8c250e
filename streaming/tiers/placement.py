"""What lies whole where, what is wanted there, and so what is to be copied. Pure: no disk, no bucket, no clock.

A kept folder has one key in every place. What outgrow copied there is a copy, anything else an original: a copy may be
repaired, replaced by a newer version or removed, an original is only ever read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from outgrow.recipes.placed import Kind
from outgrow.recipes.schema.tiers import Placement
from outgrow.streaming.tiers.slot_room import shown

OUTSIDE = ""
"""The place of an original that lies in none of the site's: a folder of weights that ``sources`` names."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A folder as it lies in a place. ``version`` is the digest of its manifest, empty where that cannot be read; ``problem``
    says in words why it is not whole, and is empty where it is."""

    place: str
    copied: bool
    version: str
    num_bytes: int
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A kept folder and where it lies, in the order of the places, ``OUTSIDE`` first."""

    key: str
    kind: Kind
    holdings: tuple[Holding, ...]

    def at(self, place: str) -> Holding | None:
        return next((holding for holding in self.holdings if holding.place == place), None)

    @property
    def version(self) -> str:
        """The version that counts: the original's, a whole one's before that of a damaged one, else a copy's."""
        known = [holding for holding in self.holdings if holding.version]
        best = min(known, key=lambda holding: (holding.copied, holding.problem != ""), default=None)
        return best.version if best is not None else ""

    @property
    def whole(self) -> tuple[Holding, ...]:
        """Those that can be copied from."""
        return tuple(holding for holding in self.holdings if not holding.problem and holding.version == self.version)

    @property
    def num_bytes(self) -> int:
        """Size of a whole one; of the largest where none is whole."""
        return max((holding.num_bytes for holding in self.whole or self.holdings), default=0)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a place has for copies.

    ``free_bytes`` of its disk (None: a bucket), of which ``reserve_bytes`` are never touched and ``promised_bytes`` are for the
    shards of living runs; ``capacity_bytes`` for all that outgrow copies there (None: no limit), of which ``taken_bytes`` are
    taken. ``begun`` has the bytes of unfinished copies by key. ``problem`` says why nothing can be written there, if so.
    """

    free_bytes: int | None = None
    reserve_bytes: int = 0
    promised_bytes: int = 0
    capacity_bytes: int | None = None
    taken_bytes: int = 0
    begun: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""

    @property
    def left_bytes(self) -> int | None:
        """Bytes that may still be copied there; None: no limit."""
        disk = None if self.free_bytes is None else self.free_bytes - self.reserve_bytes - self.promised_bytes
        capacity = None if self.capacity_bytes is None else self.capacity_bytes - self.taken_bytes
        known = [max(0, left) for left in (disk, capacity) if left is not None]
        return min(known, default=None)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A folder that is to be copied to ``target``, each file from the first of ``sources`` that has it whole.

    ``repair``: a copy lies there that is damaged, or of an older version. ``num_bytes`` are still to be written, in ``seconds``
    (None: not known). ``refusal`` says why it cannot be, if so.
    """

    key: str
    kind: Kind
    target: str
    sources: tuple[str, ...]
    repair: bool
    num_bytes: int
    seconds: float | None
    refusal: str = ""


def wanted_copies(items: Iterable[Item], place: Placement) -> list[tuple[Item, str]]:
    """Every (item, place) that ``place:`` of the site asks for."""
    tiers: Mapping[Kind, tuple[str, ...]] = {
        "datasets": place.datasets,
        "weights": place.weights,
        "quantised": place.quantised,
        "checkpoints": place.checkpoints,
    }
    return [(item, tier) for item in items for tier in tiers[item.kind]]


def plan_copies(
    items: Iterable[Item],
    wanted: Sequence[tuple[Item, str]],
    rooms: Mapping[str, Room],
    bytes_per_s: Mapping[str, float | None],
) -> list[Copy]:
    """What is missing of ``wanted``, in its order; what does not fit is refused, and smaller ones after it may fit.

    ``items`` are all that there are; ``rooms`` and ``bytes_per_s`` by place, None for a speed that is not known. A row index
    goes where its store lies or goes.
    """
    left = {name: room.left_bytes for name, room in rooms.items()}
    present = {(item.key, holding.place) for item in items for holding in item.holdings}
    copies: list[Copy] = []
    for item, target in wanted:
        there = item.at(target)
        if there is not None and (not there.copied or there in item.whole):
            continue
        sources = tuple(holding.place for holding in item.whole if holding.place != target)
        begun = rooms[target].begun.get(item.key, 0) if there is None else there.num_bytes
        need = max(0, item.num_bytes - begun)
        speed = min((rate for rate in map(bytes_per_s.get, (*sources[:1], target)) if rate), default=None)
        parent = item.key.rpartition("/")[0] if is_index(item) else ""
        if parent and (parent, target) not in present:
            refusal = f"its store {parent} is not there"
        else:
            refusal = _refusal(sources, rooms[target], need, left[target])
        copies.append(
            Copy(
                key=item.key,
                kind=item.kind,
                target=target,
                sources=sources,
                repair=there is not None,
                num_bytes=need,
                seconds=need / speed if speed else None,
                refusal=refusal,
            )
        )
        room = left[target]
        if not refusal:
            present.add((item.key, target))
            left[target] = None if room is None else room - need
    return copies


def is_index(item: Item) -> bool:
    """Whether it is a row index, which lies below its store."""
    return item.kind == "datasets" and item.key.count("/") > 1


def _refusal(sources: Sequence[str], room: Room, need: int, left: int | None) -> str:
    if room.problem:
        return room.problem
    if not sources:
        return "no place has it whole"
    if left is not None and need > left:
        return f"it needs {shown(need)}, {shown(left)} are left ({_limits(room)})"
    return ""


def _limits(room: Room) -> str:
    words = []
    if room.free_bytes is not None:
        words.append(f"free {shown(room.free_bytes)}, reserve {shown(room.reserve_bytes)}")
    if room.promised_bytes:
        words.append(f"{shown(room.promised_bytes)} for the shards of runs")
    if room.capacity_bytes is not None:
        words.append(f"capacity {shown(room.capacity_bytes)}, taken {shown(room.taken_bytes)}")
    return ", ".join(words)


def removal_refusal(item: Item, place: str) -> str:
    """Why the copy of ``item`` at ``place`` may not be removed; empty where it may."""
    there = item.at(place)
    if there is None:
        return f"{item.key} does not lie on {place}"
    if not there.copied:
        return f"{item.key} on {place} is an original: outgrow did not copy it there, and never deletes it"
    if not any(holding.place != place for holding in item.whole):
        return f"{item.key} on {place} is the last one; no other place has it whole"
    return ""
