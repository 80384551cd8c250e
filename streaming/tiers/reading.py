"""How a node reads a dataset: where it lies, or through the first tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outgrow.contracts import DatasetCard
from outgrow.recipes.schema.site import Site
from outgrow.retry import Unreachable
from outgrow.streaming.manifest import folders
from outgrow.streaming.mirror import absent, mirror
from outgrow.streaming.tiers.places import Place, open_places, storage_place

_ASK_S = 5.0
"""So long is a bucket asked whether it has a dataset; one that does not answer may still have it."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where a node reads a dataset.

    ``hot`` is None where it is read in place: ``store`` is then a folder with all of it. Else ``store`` has all but the shards,
    which are read through slots of ``hot``. ``holders`` are the places that have it whole, in the order of tiers; the site's
    storage is among them also where it did not answer.
    """

    store: Path
    hot: Place | None
    holders: tuple[Place, ...]


def open_reading(site: Site, card: DatasetCard) -> Reading:
    """In place where the first tier, or a local storage without tiers, alone has the dataset whole; else through the first
    tier, with store and indexes, but not the shards, copied below ``site.cache``.

    Raises ``DataError`` where no place has the dataset, and what ``mirror`` raises.
    """
    places = open_places(site)
    holders = find_holders(site, card, places)
    if not holders:
        raise absent(places, card.store)
    if holders == places[:1] and holds_whole(places[0], card):
        return Reading(store=places[0].folder / card.store, hot=None, holders=holders)
    return Reading(store=mirror(holders, card, Path(site.cache).expanduser()), hot=places[0], holders=holders)


def find_holders(site: Site, card: DatasetCard, places: Sequence[Place]) -> tuple[Place, ...]:
    """The places that have the store whole, and the site's storage where it does not answer within seconds."""
    storage = storage_place(site, tuple(places))
    return tuple(place for place in places if _holds(place, card.store, unknown=place is storage))


def holds_whole(place: Place, card: DatasetCard) -> bool:
    """Whether a local place has the store and every row index of the card."""
    return place.is_local and all(place.holds(key) for key in folders(card))


def _holds(place: Place, key: str, *, unknown: bool) -> bool:
    """Whether a place has the committed folder; ``unknown`` where it does not answer."""
    try:
        return replace(place, storage=place.storage.with_patience(_ASK_S)).holds(key)
    except Unreachable:
        return unknown
