"""The places that data moves between, opened: the tiers of a site, fastest first, and its storage, which is always one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outgrow.recipes.schema.site import Site, open_place
from outgrow.recipes.schema.tiers import Tier
from outgrow.storage import Storage
from outgrow.streaming.manifest import MARKER

STORAGE = "storage"
"""Name of the place that ``storage:`` gives, where no tier has its path."""
IMPLIED = "cache"
"""Name of the first tier where none is given and ``storage`` is a bucket: the site's ``cache`` folder."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tier, opened. Datasets, runs and other kept folders lie in it under the same keys everywhere; ``tier`` says how large
    and how fast it is."""

    name: str
    storage: Storage
    tier: Tier

    @property
    def is_local(self) -> bool:
        return self.storage.is_local

    @property
    def folder(self) -> Path:
        """The folder of a local one."""
        assert self.is_local, "a bucket has no folder"
        return Path(self.storage.root)

    def holds(self, key: str) -> bool:
        """Whether the committed folder ``key`` lies here."""
        return self.storage.exists(f"{key}/{MARKER}")


def open_places(site: Site) -> tuple[Place, ...]:
    """Every tier in the order of the site, and its storage last where no tier is at that path.

    Raises ``SiteError`` for a URL that cannot be opened here; nothing is read or written.
    """
    tiers = site.tiers or ((Tier(name=IMPLIED, path=site.cache),) if "://" in site.storage else ())
    places = [
        Place(name=tier.name, storage=open_place(tier.path, tier.options, f"tiers[{number}].path"), tier=tier)
        for number, tier in enumerate(tiers)
    ]
    if not any(_same(tier.path, site.storage) for tier in tiers):
        tier = Tier(name="kept", path=site.storage)
        places.append(Place(name=STORAGE, storage=site.open_storage(), tier=tier))
    return tuple(places)


def storage_place(site: Site, places: tuple[Place, ...]) -> Place:
    """The place of the site's storage among ``open_places``."""
    return next(place for place in places if place.name == STORAGE or _same(place.tier.path, site.storage))


def _same(path: str, other: str) -> bool:
    return path.rstrip("/") == other.rstrip("/")
