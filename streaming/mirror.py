"""A dataset's store and row indexes without the shards, copied to this node from wherever they lie whole."""

from __future__ import annotations

import fcntl
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, IntegrityError, SiteError
from outgrow.retry import Unreachable
from outgrow.storage import Storage, file_digest, sync_folder, sync_tree
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, MARKER, STORE_MANIFEST, check_manifest, folders, is_committed
from outgrow.streaming.tiers.places import Place

MIRROR = "mirror"
"""Folder of a site's cache that copies lie in, under the keys of the storage; directly in the cache lie whole stores."""

_ATTEMPTS = 3
_ASIDE = ".fetching"


def mirror(places: Sequence[Place], card: DatasetCard, cache: Path) -> Path:
    """The folder of the store below ``cache``, with the row indexes in it: all files but the shards.

    The first process of a node copies from the first place that has a folder whole, while the others wait; each file is checked
    against the manifest, a bad one is fetched again, and the folder is renamed into place when it is complete. An interrupted
    copy is taken up where it stopped. Raises ``DataError`` where the cache has no room or no place has the dataset,
    ``IntegrityError`` where a file stays wrong, ``Unreachable`` where a place that may have it does not answer.
    """
    for key in folders(card):
        if not is_committed(cache / MIRROR / key):
            with _only_one_here(cache / MIRROR / ".locks" / key.replace("/", "-")):
                if not is_committed(cache / MIRROR / key):
                    _mirror(places, key, STORE_MANIFEST if key == card.store else INDEX_MANIFEST, cache / MIRROR)
    return cache / MIRROR / card.store


def absent(places: Sequence[Place], key: str) -> DataError:
    """That no place has the committed folder ``key``."""
    return DataError(
        f"node {socket.gethostname()} has no dataset {key} under {' or '.join(place.storage.root_url for place in places)}",
        hint="outgrow data build makes it; for several nodes, set storage: in site.yaml to a URL that all of them reach",
    )


def _mirror(places: Sequence[Place], key: str, manifest_name: str, root: Path) -> None:
    """Copy one committed folder from the first place that has it whole. Where none has, raises what was wrong with the first
    that had it or did not answer."""
    aside = root / _ASIDE / key.replace("/", "-")
    aside.mkdir(parents=True, exist_ok=True)
    failures: list[Exception] = []
    for place in places:
        try:
            if not place.holds(key):
                continue
            _copy(place.storage, key, manifest_name, aside)
        except (IntegrityError, Unreachable, SiteError, OSError) as error:  # a disk that fails too
            failures.append(error)
            continue
        sync_tree(aside)
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        aside.rename(root / key)
        sync_folder((root / key).parent)
        return
    raise failures[0] if failures else absent(places, key)


def _copy(storage: Storage, key: str, manifest_name: str, aside: Path) -> None:
    """Fill ``aside`` with every file of the manifest, then the manifest and its marker."""
    where = f"{storage.root_url}/{key}/{manifest_name}"
    try:
        text, marker = storage.read(f"{key}/{manifest_name}"), storage.read(f"{key}/{MARKER}")
    except FileNotFoundError:
        raise IntegrityError("the file is missing, or its COMMITTED marker", where=where) from None
    digests: Mapping[str, str] = check_manifest(text, marker.decode(errors="replace"), where)[FILES]
    _check_room(storage, key, digests, aside)
    for name, expected in sorted(digests.items()):
        _download(storage, f"{key}/{name}", aside / name, expected)
    (aside / manifest_name).write_bytes(text)
    (aside / MARKER).write_bytes(marker)


def _check_room(storage: Storage, key: str, names: Iterable[str], aside: Path) -> None:
    wanted = {PurePosixPath(name) for name in names}
    num_bytes = 0
    for folder in {path.parent for path in wanted}:
        sizes = storage.sizes(f"{key}/{folder}")
        num_bytes += sum(size for name, size in sizes.items() if folder / name in wanted)
    begun = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
    free = shutil.disk_usage(aside).free
    if free + begun < num_bytes:
        raise DataError(
            f"what is kept of the dataset beside its shards takes {num_bytes:,} bytes, the cache has {free:,} free",
            where=str(aside),
            hint="set cache: in site.yaml to a folder on a larger disk",
        )


def _download(storage: Storage, key: str, path: Path, expected: str) -> None:
    """A file with the expected sha256; what an interrupted copy left whole is kept."""
    if path.is_file() and file_digest(path) == expected:
        return
    for _ in range(_ATTEMPTS):
        try:
            storage.download(key, path)
        except FileNotFoundError:
            raise IntegrityError("the file is missing", where=f"{storage.root_url}/{key}") from None
        if file_digest(path) == expected:
            return
    path.unlink()
    raise IntegrityError(
        f"the bytes differ from their digest after {_ATTEMPTS} downloads",
        where=f"{storage.root_url}/{key}",
        hint="the stored copy is damaged: outgrow data verify shows which files are; build the dataset again",
    )


@contextmanager
def _only_one_here(lock: Path) -> Iterator[None]:
    """Holds a lock among the processes of this node; the kernel frees it when its holder dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
