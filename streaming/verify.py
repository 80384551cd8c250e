"""Every file of a dataset read again, wherever it is stored, and compared with its digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, IntegrityError
from outgrow.storage import Storage
from outgrow.streaming.manifest import FILES, MARKER, check_manifest
from outgrow.streaming.rows import INDEX_MANIFEST
from outgrow.streaming.store import MANIFEST, StoreFacts

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was read and found whole."""

    files: int
    num_bytes: int


def verify(storage: Storage, card: DatasetCard) -> Verified:
    """Read store and row index whole. Raises ``IntegrityError`` naming every file that is missing or differs."""
    wrong: list[str] = []
    files = num_bytes = 0
    for folder, manifest in ((card.store, MANIFEST), (card.index, INDEX_MANIFEST)):
        for name, expected in _read_manifest(storage, folder, manifest)[FILES].items():
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


def stored_facts(storage: Storage, card: DatasetCard) -> StoreFacts:
    """What the store's manifest says. Raises ``IntegrityError`` where it differs from its marker."""
    manifest = _read_manifest(storage, card.store, MANIFEST)
    return StoreFacts.from_dict({name: manifest[name] for name in StoreFacts.__dataclass_fields__})


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
