"""The dataset on this node: the folder itself where it is read in place, a checked copy of all but its shards elsewhere."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from outgrow.contracts import DatasetCard, IndexCard
from outgrow.recipes.schema.site import Site
from outgrow.streaming.tiers.reading import open_reading


def local_dataset(site: Site, card: DatasetCard) -> Path:
    """The folder of the token store on this node, with the row indexes below it as in storage; without shards where those are
    read through a tier.

    Raises ``DataError`` where the dataset is not there or the cache has no room, ``IntegrityError`` where a file stays wrong.
    """
    return open_reading(site, card).store


def index_folder(store: Path, card: DatasetCard, index: IndexCard) -> Path:
    """Where a row index of the dataset lies on this node, ``store`` being what ``local_dataset`` gave."""
    return store / PurePosixPath(index.folder).relative_to(card.store)
