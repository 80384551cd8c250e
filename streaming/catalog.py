"""Which datasets a storage has: their cards by what they were made from, and how one gets there.

``datasets/by-recipe/`` remembers cards by the content of the inputs and what the recipe does with them, and by the recipe's
section alone, so that a machine that lacks the sources finds the dataset by the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from outgrow.contracts import DatasetCard
from outgrow.errors import IntegrityError
from outgrow.recipes.schema import Recipe
from outgrow.storage import Storage, fingerprint
from outgrow.streaming import row_building
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, MARKER, STORE_MANIFEST, folders, is_inside, read_manifest
from outgrow.streaming.shards import every_file
from outgrow.streaming.store import FORMAT


def index_identities(recipe: Recipe, identity: str) -> tuple[str, ...]:
    """Fingerprint of the recipe's index of the store ``identity``, for each of its lengths of rows."""
    return tuple(
        row_building.index_fingerprint(identity, data=recipe.data, sequence_length=length, seed=recipe.run.seed)
        for length in recipe.data.sequence_lengths
    )


def content_key(recipe: Recipe, identity: str) -> str:
    """Where the card of the store ``identity`` with the recipe's rows is remembered."""
    return f"datasets/by-recipe/{fingerprint(index_identities(recipe, identity))}.json"


def section_key(recipe: Recipe) -> str:
    """Where the card of this ``data`` section and seed is remembered. What changes no row is left out: reading ahead, damage,
    and how much of each stream a run takes."""
    section = recipe.data.model_dump(mode="json", exclude={"loader_workers", "on_bad_shard", "stages"})
    for stream in section["streams"]:
        del stream["epochs"], stream["share"]
        if stream["use"] == "training":
            del stream["use"]  # not asked before there were others: datasets from then are found
    formats = [FORMAT, row_building.FORMAT]
    lengths = recipe.data.sequence_lengths
    key = fingerprint({"data": section, "lengths": lengths, "seed": recipe.run.seed, "formats": formats})
    return f"datasets/by-recipe/{key}.json"


def remembered(storage: Storage, key: str) -> DatasetCard | None:
    """The card that an earlier build left at ``key``, if its store and indexes are still there.

    Raises ``IntegrityError`` for what is no card, or one of folders elsewhere.
    """
    if not storage.exists(key):
        return None
    hint = "remove the file; outgrow data build writes it again"
    try:
        card = DatasetCard.from_dict(storage.read_json(key))
        inside = all(is_inside(folder) for folder in folders(card))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"this is no card of a dataset: {error}", where=key, hint=hint) from None
    if not inside or not all(index.folder.startswith(f"{card.store}/") for index in card.indexes):
        raise IntegrityError("the card names folders that are none of a dataset", where=key, hint=hint)
    return card if all(storage.exists(f"{folder}/{MARKER}") for folder in folders(card)) else None


def upload(folder: Path, storage: Storage, key: str, on_bytes: Callable[[int, int], None]) -> None:
    """Copy a committed folder to ``key``, its marker last; nothing where it is there. ``on_bytes`` is told how many bytes of
    how many are done."""
    if storage.exists(f"{key}/{MARKER}"):
        return
    total_bytes, done_bytes = stored_bytes(folder), 0
    for path in _files(folder):
        storage.upload(path, f"{key}/{path.relative_to(folder).as_posix()}")
        done_bytes += path.stat().st_size
        on_bytes(done_bytes, total_bytes)


def stored_bytes(folder: Path) -> int:
    """Size of a committed folder."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """The files of a committed folder, its manifest and, last, its marker."""
    manifest = STORE_MANIFEST if (folder / STORE_MANIFEST).is_file() else INDEX_MANIFEST
    digests = read_manifest(folder, manifest)[FILES]
    for name, _ in every_file(digests, lambda name: (folder / name).read_bytes()):
        yield folder / name
    yield folder / manifest
    yield folder / MARKER
