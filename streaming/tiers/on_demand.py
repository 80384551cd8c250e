"""Documents in no known order: for commands that look into a dataset, wherever it lies.

Where a local disk has the dataset whole it is read there. Else a shard is copied into a slot of the first tier when it is asked
for, checked on the way, and the one asked for longest ago is deleted when room is short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from outgrow.contracts import DatasetCard
from outgrow.recipes.schema.site import Site
from outgrow.storage import file_digest
from outgrow.streaming.documents import Documents
from outgrow.streaming.manifest import FILES, STORE_MANIFEST, read_manifest
from outgrow.streaming.tiers.rate import RateLimit
from outgrow.streaming.tiers.reading import holds_whole, open_reading
from outgrow.streaming.tiers.shard_list import ShardFile, ShardList, split_folder
from outgrow.streaming.tiers.slot import Slot, take_slot
from outgrow.streaming.tiers.transfer import Fetcher

_MOST_BYTES = 4 * 10**9
"""Room that a command asks for; runs need the rest."""
_FEWEST_SHARDS = 2
"""Room for so many of the largest shards must be there."""


class Dataset:
    """A dataset that a command reads; ``store`` is a local folder with all of it but, maybe, the shards."""

    def __init__(self, store: Path, shards: _Shards | None) -> None:
        self.store = store
        self.digests: Mapping[str, str] = read_manifest(store, STORE_MANIFEST)[FILES]
        self._shards = shards

    def documents(self, stream: str, split: Literal["train", "validation"], *, open_shards: int) -> Documents:
        """The documents of a split; of its shards, ``open_shards`` stay mapped."""
        path_of = None if self._shards is None else self._shards.path_of(split_folder(stream, split))
        return Documents(self.store, stream, split, self.digests, open_shards=open_shards, path_of=path_of)


@contextmanager
def open_dataset(site: Site, card: DatasetCard) -> Iterator[Dataset]:
    """The dataset for the time of a ``with``; a slot of the first tier is held meanwhile where its shards are copied.

    Raises ``DataError`` where no place has the dataset or the first tier has no room, ``IntegrityError`` where a byte differs.
    """
    reading = open_reading(site, card)
    local = next((place for place in reading.holders if holds_whole(place, card)), None)
    if local is not None:
        yield Dataset(local.folder / card.store, None)
        return
    assert reading.hot is not None, "what is read in place lies whole on a local disk"
    shards = ShardList.open(reading.store, [stream.name for stream in card.streams])
    smallest = _FEWEST_SHARDS * int(shards.num_bytes.max(initial=0))
    wanted = min(_MOST_BYTES, int(shards.num_bytes.sum()))
    limit = reading.hot.tier.limit_bytes_per_s
    fetcher = Fetcher(reading.holders, card.store, limiter=RateLimit(limit) if limit else None)
    with take_slot(reading.hot, card.store, run="", dataset_bytes=wanted, smallest=smallest, patience_s=0.0) as slot:
        yield Dataset(reading.store, _Shards(slot, shards, fetcher))


class _Shards:
    """Shards in a slot, fetched when they are asked for. A shard that is deleted while it is mapped stays readable."""

    def __init__(self, slot: Slot, shards: ShardList, fetcher: Fetcher) -> None:
        self._slot = slot
        self._fetcher = fetcher
        self._files = {file.name: file for file in map(shards.file, range(len(shards)))}
        self._present = OrderedDict((file.name, file.num_bytes) for file in map(shards.file, slot.present(shards)))
        self._unverified = set(self._present)

    def path_of(self, folder: str) -> Callable[[str], Path]:
        """The path of a shard of the folder ``folder`` of the store, by the name of its file."""
        return lambda name: self._path(self._files[f"{folder}/{name}"])

    def _path(self, file: ShardFile) -> Path:
        path = self._slot.path(file)
        if file.name in self._unverified:
            self._unverified.remove(file.name)
            if file_digest(path) != file.sha256:
                self._drop(file.name)
        if file.name not in self._present:
            while self._present and sum(self._present.values()) + file.num_bytes > self._slot.room_bytes:
                self._drop(next(iter(self._present)))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fetcher.fetch(file, path)
            self._present[file.name] = file.num_bytes
        self._present.move_to_end(file.name)
        return path

    def _drop(self, name: str) -> None:
        self._slot.path(self._files[name]).unlink()
        del self._present[name]
        self._unverified.discard(name)
