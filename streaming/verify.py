"""Every file of a dataset read again, wherever it is stored, and compared with its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, IntegrityError
from outgrow.storage import Storage
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, MARKER, STORE_MANIFEST, check_manifest, folders
from outgrow.streaming.rows import IndexFacts
from outgrow.streaming.shards import every_file
from outgrow.streaming.store import StoreFacts, parse_facts

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was read and found whole."""

    files: int
    num_bytes: int


def verify(storage: Storage, card: DatasetCard) -> Verified:
    """Read store and row indexes whole. Raises ``IntegrityError`` naming every file that is missing or differs."""
    wrong: list[str] = []
    files = num_bytes = 0
    for folder in folders(card):
        digests = _read_manifest(storage, folder, STORE_MANIFEST if folder == card.store else INDEX_MANIFEST)[FILES]
        for name, expected in _vouched(storage, folder, digests):
            key = f"{folder}/{name}"
            if not storage.exists(key):
                wrong.append(f"{key}: the file is missing")
                continue
            actual, size = _digest(storage, key)
            files, num_bytes = files + 1, num_bytes + size
            if actual != expected:
                wrong.append(f"{key}: the bytes differ from their digest")
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} of the dataset's files cannot be trusted:\n" + "\n".join(wrong),
            where=storage.root_url,
            hint=f"remove the folder {card.store} and build it again",
        )
    return Verified(files=files, num_bytes=num_bytes)


def _vouched(storage: Storage, folder: str, digests: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every file of a folder with its digest; of a table of shards that is damaged itself, no shard."""
    for name, expected in digests.items():
        try:
            yield from every_file({name: expected}, lambda name: storage.read(f"{folder}/{name}"))
        except (FileNotFoundError, IntegrityError):
            continue  # the table was yielded before it was read, and is found damaged


def stored_facts(storage: Storage, card: DatasetCard) -> StoreFacts:
    """What the store's manifest says. Raises ``IntegrityError`` where it differs from its marker."""
    manifest = _read_manifest(storage, card.store, STORE_MANIFEST)
    return parse_facts(manifest)


def stored_index_facts(storage: Storage, card: DatasetCard) -> tuple[IndexFacts, ...]:
    """What the manifest of each index says. Raises ``IntegrityError`` where one differs from its marker."""
    manifests = (_read_manifest(storage, index.folder, INDEX_MANIFEST) for index in card.indexes)
    return tuple(
        IndexFacts.from_dict({name: manifest[name] for name in IndexFacts.__dataclass_fields__}) for manifest in manifests
    )


def _read_manifest(storage: Storage, folder: str, name: str) -> dict[str, Any]:
    if not storage.exists(f"{folder}/{MARKER}"):
        raise DataError("the folder was never finished or is not there", where=f"{storage.root_url}/{folder}")
    marker = storage.read(f"{folder}/{MARKER}").decode(errors="replace")
    return check_manifest(storage.read(f"{folder}/{name}"), marker, f"{storage.root_url}/{folder}/{name}")


def _digest(storage: Storage, key: str) -> tuple[str, int]:
    """sha256 and size of a stored file, read in parts."""
    sha256, size = hashlib.sha256(), 0
    with storage.fs.open(storage.path(key), "rb") as file:
        while chunk := file.read(_READ_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return sha256.hexdigest(), size
