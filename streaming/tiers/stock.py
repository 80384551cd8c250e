"""What kept folders lie in the places of a site: which are originals and which copies, and which of them are whole.

``<tier>/placed/`` has a record of each copy that outgrow finished, ``<tier>/placing/`` a claim of each that it began. Names in
a bucket may be anybody's: those that cannot be part of a key are refused, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outgrow.errors import DataError, IntegrityError, OutgrowError
from outgrow.recipes.placed import (
    COPY_MARK,
    PLACED,
    PLACING,
    WEIGHTS,
    Kind,
    Placed,
    claim_key,
    flat,
    is_name,
    is_weights,
    read_record,
    read_records,
    record_key,
)
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, digest
from outgrow.streaming.manifest import MARKER
from outgrow.streaming.tiers.contents import (
    Contents,
    ReadContents,
    copied_weights,
    dataset_contents,
    index_contents,
    original_weights,
    quantised_contents,
    stored_sizes,
    wrong_files,
)
from outgrow.streaming.tiers.placement import OUTSIDE, Holding, Item, Room
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.slot import measured_speeds, slots

_STEP = re.compile(r"step-\d{8,}")
PATIENCE_S = 30.0
"""How long a place is asked what it holds; a copy itself is given longer."""
_INDEX_PREFIX = "rows-"
_NO_DATASETS = {"by-recipe"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder to copy from: what it consists of, the size of each file, and the storage and key of each."""

    name: str
    contents: Contents
    sizes: Mapping[str, int]
    files: Mapping[str, tuple[Storage, str]]


@dataclass(frozen=True, kw_only=True)
class Stock:
    """All kept folders by key, what each place has room for, and ``notes`` on what was left out, for people."""

    items: tuple[Item, ...]
    rooms: Mapping[str, Room]
    notes: tuple[str, ...]


class Shelves:
    """The places of a site, and how to read the kept folders in them. ``checkpoint`` reads those of a checkpoint."""

    def __init__(self, site: Site, places: Sequence[Place], checkpoint: ReadContents) -> None:
        self.places = tuple(places)
        self._readers: dict[Kind, ReadContents] = {"quantised": quantised_contents, "checkpoints": checkpoint}
        self._weights = {
            f"{WEIGHTS}/{name}": Path(path)
            for name, path in sorted(site.sources.items())
            if "://" not in path and is_name(name) and is_weights(Path(path))
        }
        self._misnamed = [
            name for name, path in site.sources.items() if "://" not in path and not is_name(name) and is_weights(Path(path))
        ]

    def place(self, name: str) -> Place:
        """Raises ``DataError`` where the site has no such place."""
        for place in self.places:
            if place.name == name:
                return place
        known = ", ".join(place.name for place in self.places)
        raise DataError(f"there is no place '{name}' in the site; places: {known}")

    def stock(self, *, read: bool) -> Stock:
        """What lies where; with ``read`` every byte of every copy is read and compared with its digest.

        A place that does not answer is noted, and its room has the problem.
        """
        notes = [f"source {ascii(name)}: its name cannot be that of a folder in every place" for name in self._misnamed]
        found: dict[str, tuple[Kind, list[Holding]]] = {}
        for key, folder in self._weights.items():
            if self._home(key) is None:
                found[key] = ("weights", [self._original_weights(key, OUTSIDE, notes, folder)])
        rooms: dict[str, Room] = {}
        for given in self.places:
            place = replace(given, storage=given.storage.with_patience(PATIENCE_S))
            held = list[Holding]()
            try:
                _check_there(place)
                records = {record.key: record for record in self.records(place)}
                claims = {claim.key: claim for claim in self.claims(place)}
                for kind, key in self._keys(place, notes):
                    holding = self._held(place, kind, key, records.get(key), claims.get(key), notes, read=read)
                    if holding is not None:
                        found.setdefault(key, (kind, []))[1].append(holding)
                        held.append(holding)
                rooms[place.name] = self._room(place, held, claims)
            except (OSError, OutgrowError) as error:
                rooms[place.name] = Room(problem=f"{place.name}: {error}")
                notes.append(f"{place.name}: {error}")
        items = (Item(key=key, kind=kind, holdings=tuple(holdings)) for key, (kind, holdings) in sorted(found.items()))
        return Stock(items=tuple(items), rooms=rooms, notes=tuple(notes))

    def item(self, kind: Kind, key: str) -> Item:
        """Where the folder ``key`` lies now."""
        folder = self._weights.get(key)
        outside = folder is not None and self._home(key) is None
        holdings = [self._original_weights(key, OUTSIDE, [], folder)] if outside and folder is not None else []
        holdings += [holding for place in self.places if (holding := self.holding(place, kind, key)) is not None]
        return Item(key=key, kind=kind, holdings=tuple(holdings))

    def holding(self, place: Place, kind: Kind, key: str) -> Holding | None:
        """The folder ``key`` as it lies in a place; None where none lies there, or one that is being made by somebody else."""
        return self._held(place, kind, key, self.record(place, key), self.claim(place, key), [], read=False)

    def _held(
        self,
        place: Place,
        kind: Kind,
        key: str,
        record: Placed | None,
        claim: Placed | None,
        notes: list[str],
        *,
        read: bool,
    ) -> Holding | None:
        if kind == "weights" and self._home(key) == place.name:
            return self._original_weights(key, place.name, notes, self._weights[key])
        committed = record is not None and claim is None if kind == "weights" else place.holds(key)
        if not committed:
            if record is None and (claim is None or place.is_local) or not place.storage.exists(f"{key}/{COPY_MARK}"):
                return None
            num_bytes = _own_bytes(stored_sizes(place.storage, key))
            unfinished = Holding(place=place.name, copied=True, version="", num_bytes=num_bytes, problem="not finished")
            return unfinished if num_bytes else None
        return self._committed(place, kind, key, record, read=read)

    def open(self, kind: Kind, key: str, name: str) -> Source:
        """The folder ``key`` of the place ``name``, to copy from.

        Raises ``FileNotFoundError`` where it is gone, ``IntegrityError`` or ``DataError`` where it cannot be trusted.
        """
        if kind == "weights" and name == (self._home(key) or OUTSIDE):
            original = original_weights(self._weights[key])
            files = {file: (Storage(str(path.parent)), path.name) for file, path in original.paths.items()}
            sizes = {file: facts.num_bytes or 0 for file, facts in original.contents.files.items()}
            return Source(name=name, contents=original.contents, sizes=sizes, files=files)
        place = self.place(name)
        contents = self._contents(place, kind, key, self.record(place, key))
        sizes = stored_sizes(place.storage, key)
        files = {file: (place.storage, f"{key}/{file}") for file in contents.files}
        return Source(name=name, contents=contents, sizes=sizes, files=files)

    def location(self, key: str, name: str) -> str:
        """Where that is, for people and records; of weights, the original's folder."""
        if key in self._weights:
            return str(self._weights[key])
        return f"{self.place(name).storage.root_url}/{key}"

    def record(self, place: Place, key: str) -> Placed | None:
        """The record of the copy of ``key`` in a place; None where outgrow made none there."""
        return read_record(place.storage, record_key(key), key)

    def claim(self, place: Place, key: str) -> Placed | None:
        """What was said of the copy of ``key`` when it was begun; None where none is under way."""
        return read_record(place.storage, claim_key(key), key)

    def claims(self, place: Place) -> Iterator[Placed]:
        """The copies that were begun in a place and not finished."""
        return read_records(place.storage, PLACING)

    def records(self, place: Place) -> Iterator[Placed]:
        """The copies that outgrow finished in a place, whether or not they still lie there."""
        return read_records(place.storage, PLACED)

    def _keys(self, place: Place, notes: list[str]) -> Iterator[tuple[Kind, str]]:
        """Kind and key of whatever may be a kept folder of a place."""
        for name in _names(place, "datasets", notes):
            if name not in _NO_DATASETS:
                yield "datasets", f"datasets/{name}"
                for index in _names(place, f"datasets/{name}", notes):
                    if index.startswith(_INDEX_PREFIX):
                        yield "datasets", f"datasets/{name}/{index}"
        for kind in (WEIGHTS, "quantised"):
            for name in _names(place, kind, notes):
                yield ("weights" if kind == WEIGHTS else "quantised"), f"{kind}/{name}"
        for run in _names(place, "runs", notes):
            for name in _names(place, f"runs/{run}/checkpoints", notes):
                if _STEP.fullmatch(name):
                    yield "checkpoints", f"runs/{run}/checkpoints/{name}"

    def _committed(self, place: Place, kind: Kind, key: str, record: Placed | None, *, read: bool) -> Holding:
        sizes = stored_sizes(place.storage, key)
        version, contents, problem = "", None, ""
        try:
            contents = self._contents(place, kind, key, record)
            version = contents.digest
            wrong = wrong_files(place.storage, key, contents, sizes, read=read)
            problem = f"missing or damaged: {_listed(wrong)}" if wrong else ""
        except FileNotFoundError:
            problem = "its manifest is missing"
        except (IntegrityError, DataError) as error:
            problem = error.message
        except OSError as error:
            if not place.is_local:
                raise
            problem = str(error)  # a disk that cannot read this file may read others
        copied = False
        if record is not None and COPY_MARK in sizes and not _is_link(place, key):
            copied = version == record.digest if contents is not None else _is_of(place.storage, key, record)
            version = record.digest if copied else version
        return Holding(place=place.name, copied=copied, version=version, num_bytes=_own_bytes(sizes), problem=problem)

    def _contents(self, place: Place, kind: Kind, key: str, record: Placed | None) -> Contents:
        if kind == "weights":
            if record is None:
                raise FileNotFoundError(f"{key} is not on {place.name}")
            return copied_weights(record)
        if kind == "datasets":
            return (index_contents if key.count("/") > 1 else dataset_contents)(place.storage, key)
        return self._readers[kind](place.storage, key)

    def _home(self, key: str) -> str | None:
        """The place that the original of weights lies in under their very key; None for any other folder."""
        folder = self._weights.get(key)
        at_home = (place.name for place in self.places if place.is_local and folder == place.folder / key)
        return next(at_home, None)

    def _original_weights(self, key: str, place: str, notes: list[str], folder: Path) -> Holding:
        try:
            original = original_weights(folder)
        except DataError as error:
            return Holding(place=place, copied=False, version="", num_bytes=0, problem=str(error))
        if original.left_out:
            notes.append(f"{key}: not copied, as nothing reads them: {_listed(original.left_out)}")
        num_bytes = sum(facts.num_bytes or 0 for facts in original.contents.files.values())
        return Holding(place=place, copied=False, version=original.contents.digest, num_bytes=num_bytes)

    def _room(self, place: Place, held: Sequence[Holding], claims: Iterable[str]) -> Room:
        begun = {key: self.begun_bytes(place, key) for key in claims}
        living = slots(place) if place.is_local else []
        in_slots = sum(max(slot.num_bytes, slot.room_bytes) if slot.leased else slot.num_bytes for slot in living)
        copies = sum(holding.num_bytes for holding in held if holding.copied)
        return Room(
            free_bytes=place.storage.free_bytes(),
            reserve_bytes=place.tier.reserve_bytes,
            promised_bytes=promised_bytes(place),
            capacity_bytes=place.tier.capacity_bytes,
            taken_bytes=copies + in_slots + (sum(begun.values()) if place.is_local else 0),
            begun=begun,
        )

    def begun_bytes(self, place: Place, key: str) -> int:
        """Bytes of an unfinished copy that lie aside; on a bucket they lie under its key."""
        return sum(stored_sizes(place.storage, aside_key(key) if place.is_local else key).values())


def known_speeds(places: Sequence[Place], limit_bytes_per_s: float | None) -> dict[str, float | None]:
    """Bytes a second of each place, declared or else measured last, within its limit and the given one; None: not known."""
    measured = measured_speeds(places[0]) if places[0].is_local else {}
    speeds: dict[str, float | None] = {}
    for place in places:
        known = (place.tier.bytes_per_s or measured.get(place.name), place.tier.limit_bytes_per_s, limit_bytes_per_s)
        speeds[place.name] = min((speed for speed in known if speed), default=None)
    return speeds


def aside_key(key: str) -> str:
    """Where on a disk the files of a copy lie until it is whole."""
    return f"{PLACING}/{flat(key)}"


def promised_bytes(place: Place) -> int:
    """Bytes of a disk that the shards of living runs may still take."""
    if not place.is_local:
        return 0
    return sum(max(0, slot.room_bytes - slot.num_bytes) for slot in slots(place) if slot.leased)


def _check_there(place: Place) -> None:
    """Raise ``DataError`` where the folder of a disk is not there, and not even the one that it would be made in."""
    if place.is_local and not place.folder.exists() and not place.folder.parent.exists():
        raise DataError("the folder is not there", where=str(place.folder), hint="connect the disk, or make the folder")


def _names(place: Place, key: str, notes: list[str]) -> Iterator[str]:
    """The names below ``key`` that may be part of a key; files aside and hidden ones are passed over, others are noted."""
    for name in place.storage.names(key):
        if is_name(name):
            yield name
        elif not name.startswith(".") or name in (".", ".."):
            notes.append(f"{place.name}: refused: {ascii(f'{key}/{name}')} is no name of a kept folder")


def _is_of(storage: Storage, key: str, record: Placed) -> bool:
    """Whether the committed folder is what the record is of: by its marker, or else by a manifest that the marker is not of."""
    if storage.exists(f"{key}/{MARKER}") and storage.read(f"{key}/{MARKER}").strip() == record.digest.encode():
        return True
    manifests = [name for name in storage.sizes(key) if name.endswith(".json")]
    return any(digest(storage.read(f"{key}/{name}")) == record.digest for name in manifests)


def _is_link(place: Place, key: str) -> bool:
    """Whether a part of the way to ``key`` is a link: what lies there is not outgrow's to change."""
    if not place.is_local:
        return False
    folder = place.folder / key
    return any(part.is_symlink() for part in (folder, *folder.parents) if part.is_relative_to(place.folder / key.split("/")[0]))


def _own_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of a folder without the committed folders below it."""
    inner = tuple(name.removesuffix(MARKER) for name in sizes if name.endswith(f"/{MARKER}"))
    return sum(size for name, size in sizes.items() if not (inner and name.startswith(inner)))


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
