"""The dataset on this node: the folder itself where storage is local, a checked copy in the site's cache where it is remote."""

from __future__ import annotations

import fcntl
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from outgrow.contracts import DatasetCard, IndexCard
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, file_digest, sync_folder, sync_tree
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, MARKER, STORE_MANIFEST, check_manifest, folders, is_committed
from outgrow.streaming.shards import every_file

_ATTEMPTS = 3
_ASIDE = ".fetching"


def local_dataset(site: Site, card: DatasetCard) -> Path:
    """The folder of the token store on this node, with the row indexes below it as in storage.

    Remote storage: the first process of a node copies into ``site.cache`` while the others wait; each file is checked against
    the manifest, a bad one is fetched again, and the folder is renamed into place when it is whole. An interrupted copy is
    taken up where it stopped. Raises ``DataError`` where the dataset is not there or the cache has no room,
    ``IntegrityError`` where a file stays wrong.
    """
    storage = site.open_storage()
    if storage.is_local:
        for key in folders(card):
            if not is_committed(Path(storage.path(key))):
                raise _absent(storage, key)
        return Path(storage.path(card.store))
    cache = Path(site.cache).expanduser()
    if not is_committed(cache / card.store):
        _check_room(cache, card.bytes)
    for key in folders(card):
        _fetch(storage, key, STORE_MANIFEST if key == card.store else INDEX_MANIFEST, cache)
    return cache / card.store


def index_folder(store: Path, card: DatasetCard, index: IndexCard) -> Path:
    """Where a row index of the dataset lies on this node, ``store`` being what ``local_dataset`` gave."""
    return store / PurePosixPath(index.folder).relative_to(card.store)


def _absent(storage: Storage, key: str) -> DataError:
    return DataError(
        f"node {socket.gethostname()} has no dataset {key} under {storage.root_url}",
        hint="outgrow data build makes it here; for several nodes, set storage: in site.yaml to a URL that all of them reach",
    )


def _check_room(cache: Path, num_bytes: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    begun = sum(path.stat().st_size for path in (cache / _ASIDE).rglob("*") if path.is_file())
    free = shutil.disk_usage(cache).free
    if free + begun < num_bytes:
        raise DataError(
            f"the dataset takes {num_bytes:,} bytes, the cache has {free:,} free",
            where=str(cache),
            hint="set cache: in site.yaml to a folder on a larger disk",
        )


def _fetch(storage: Storage, key: str, manifest_name: str, cache: Path) -> None:
    """Copy one committed folder into the cache, unless it is there."""
    folder = cache / key
    if is_committed(folder):
        return
    with _only_one_here(cache / ".locks" / key.replace("/", "-")):
        if is_committed(folder):
            return
        if not storage.exists(f"{key}/{MARKER}"):
            raise _absent(storage, key)
        aside = cache / _ASIDE / key.replace("/", "-")
        aside.mkdir(parents=True, exist_ok=True)
        _copy(storage, key, manifest_name, aside)
        sync_tree(aside)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(folder)
        sync_folder(folder.parent)


def _copy(storage: Storage, key: str, manifest_name: str, aside: Path) -> None:
    """Fill ``aside`` with every file of the manifest, then the manifest and its marker."""
    text, marker = storage.read(f"{key}/{manifest_name}"), storage.read(f"{key}/{MARKER}")
    manifest = check_manifest(text, marker.decode(), f"{storage.root_url}/{key}/{manifest_name}")
    # A table of shards is copied, and so checked, before the shards that it vouches for are asked for.
    for name, expected in every_file(manifest[FILES], lambda name: (aside / name).read_bytes()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"the manifest names a file outside its folder: {name}", where=f"{storage.root_url}/{key}")
        _download(storage, f"{key}/{name}", aside / path, expected)
    (aside / manifest_name).write_bytes(text)
    (aside / MARKER).write_bytes(marker)


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
