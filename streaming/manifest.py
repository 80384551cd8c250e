"""The manifest of a committed folder: a JSON file with the sha256 of every other file, and the marker that makes it count.

A token store has ``store.json``, a row index ``index.json``. ``COMMITTED`` is written last and holds the sha256 of the
manifest; a folder without it was never finished and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest, sync_tree, tree_digests

STORE_MANIFEST = "store.json"
INDEX_MANIFEST = "index.json"
MARKER = "COMMITTED"
FILES = "files"
"""Key of the manifest that holds the sha256 of every file by relative path; a store's leaves out the shards, whose digests are
in ``shards.safetensors`` of their folder."""


def commit(folder: Path, name: str, facts: dict[str, Any], digests: Mapping[str, str] | None = None) -> None:
    """Write the manifest ``name`` (``facts`` and the digest of every file below ``folder``), then the marker; all durable.

    ``digests`` is given where they are known, or where some files are vouched for by another. The folder is still aside; the
    caller renames it into place.
    """
    files = tree_digests(folder) if digests is None else dict(digests)
    text = json.dumps({**facts, FILES: files}, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    (folder / name).write_bytes(text)
    (folder / MARKER).write_text(digest(text) + "\n")
    sync_tree(folder)


def folders(card: DatasetCard) -> tuple[str, ...]:
    """The committed folders of a dataset: its store, and each index."""
    return (card.store, *(index.folder for index in card.indexes))


def is_committed(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def read_manifest(folder: Path, name: str) -> dict[str, Any]:
    """The manifest of a committed folder. Raises ``DataError`` where there is no marker, ``IntegrityError`` where it
    differs."""
    if not is_committed(folder):
        raise DataError("the folder was never finished or is not there", where=str(folder), hint="outgrow data build makes it")
    return check_manifest((folder / name).read_bytes(), (folder / MARKER).read_text(), str(folder / name))


def check_manifest(text: bytes, marker: str, where: str) -> dict[str, Any]:
    """``text`` parsed, once its sha256 equals the marker's. That tells that it is whole, not who wrote it.

    Raises ``IntegrityError`` where it differs or gives no digest of each file, ``DataError`` where it names a file that would
    lie outside its folder.
    """
    if digest(text) != marker.strip():
        raise IntegrityError("the manifest differs from the digest in its COMMITTED marker", where=where)
    try:
        manifest: dict[str, Any] = json.loads(text)
        digests = list(manifest[FILES].items())
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise IntegrityError(f"the manifest has no digests under '{FILES}'", where=where) from None
    for name, expected in digests:
        if not is_inside(name):
            raise DataError(f"the manifest names a file outside its folder: {ascii(name)}", where=where)
        if not isinstance(expected, str):
            raise IntegrityError(f"the manifest has no digests under '{FILES}'", where=where)
    return manifest


def is_inside(name: str) -> bool:
    """Whether ``name`` is the plain path of a file below a folder, whatever the folder: with ``/``, and without ``..``."""
    path = PurePosixPath(name)
    is_plain = bool(path.parts) and str(path) == name and not set(name) & set("\\\0")
    return is_plain and not path.is_absolute() and ".." not in path.parts
