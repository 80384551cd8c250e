"""What a kept folder consists of: every file with what is known of it beforehand, so that a copy can be made and checked.

Datasets, row indexes and quantised weights have a manifest with the sha256 of every file, checkpoints one with a digest of
every chunk; a folder of weights has none, and its files are known once they have been read. A name that leads out of the
folder is refused, whoever wrote it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from outgrow import retry
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.placed import Placed, is_file_name, weight_files
from outgrow.storage import Storage, digest
from outgrow.streaming.manifest import FILES, INDEX_MANIFEST, MARKER, STORE_MANIFEST, check_manifest
from outgrow.streaming.shards import SHARDS, ShardTable

QUANTISED_MANIFEST = "manifest.json"
_READ_BYTES = 8 * 1024 * 1024
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is known of a file: its size, and its sha256 or that of each chunk of ``chunk_bytes``; else None and empty."""

    num_bytes: int | None = None
    sha256: str | None = None
    chunk_bytes: int = 0
    chunks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The files of a folder by relative path, but for its marker. ``digest`` is what the marker holds, of weights their
    version; another digest is another content."""

    digest: str
    files: Mapping[str, FileFacts]
    has_marker: bool = True


ReadContents: TypeAlias = Callable[[Storage, str], Contents]
"""The contents of the committed folder ``key``. Raises ``IntegrityError`` where what it says of itself does not hold,
``FileNotFoundError`` where it is gone."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """A folder of weights as it stands: its contents, where each file really lies, and the names that are not copied."""

    contents: Contents
    paths: Mapping[str, Path]
    left_out: tuple[str, ...] = field(default=())


def dataset_contents(storage: Storage, key: str) -> Contents:
    """Of a token store, without the row indexes below it."""
    return _by_manifest(storage, key, STORE_MANIFEST)


def index_contents(storage: Storage, key: str) -> Contents:
    """Of a row index."""
    return _by_manifest(storage, key, INDEX_MANIFEST)


def quantised_contents(storage: Storage, key: str) -> Contents:
    return _by_manifest(storage, key, QUANTISED_MANIFEST)


def original_weights(folder: Path) -> Original:
    """A folder of safetensors. Raises ``DataError`` as ``weight_files`` does.

    The digest of a large file of a Hugging Face cache is the name of its blob.
    """
    given = weight_files(folder)
    files = {
        name: FileFacts(num_bytes=path.stat().st_size, sha256=path.name if _is_blob(path) else None)
        for name, path in given.files.items()
    }
    contents = Contents(digest=given.version, files=files, has_marker=False)
    return Original(contents=contents, paths=given.files, left_out=given.left_out)


def copied_weights(record: Placed) -> Contents:
    """Of a copy of weights, by what was read while it was made. Raises ``DataError`` for a name that leads out of it."""
    for name in record.files:
        if not is_file_name(name):
            raise DataError(f"its record names a file outside its folder: {ascii(name)}", where=record.key)
    files = {name: FileFacts(num_bytes=file.num_bytes, sha256=file.sha256) for name, file in record.files.items()}
    return Contents(digest=record.digest, files=files, has_marker=False)


def stored_sizes(storage: Storage, key: str) -> dict[str, int]:
    """Bytes of every file below ``key``, by relative path; links are no files, and are not followed."""
    if storage.is_local:
        return dict(_local_sizes(Path(storage.path(key))))
    root = storage.path(key)
    storage.fs.invalidate_cache()
    find = partial(storage.fs.find, root, detail=True)
    found = retry.call(find, what=f"list {key}", where=storage.root_url, patience=storage.patience)
    return {str(path).removeprefix(f"{root}/"): int(entry["size"]) for path, entry in found.items()}


def _local_sizes(root: Path) -> list[tuple[str, int]]:
    sizes = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):  # somebody removed it just now
                state = path.lstat()
                if stat.S_ISREG(state.st_mode):
                    sizes.append((path.relative_to(root).as_posix(), state.st_size))
    return sizes


def holds(storage: Storage, key: str, facts: FileFacts, num_bytes: int) -> bool:
    """Whether the file of ``num_bytes``, read through, is what ``facts`` say; one without any digest is not known to be."""
    if facts.sha256 is None and not facts.chunks:
        return False
    whole, digests = hashlib.sha256(), list[str]()
    block_bytes = facts.chunk_bytes or _READ_BYTES
    for start in range(0, num_bytes, block_bytes):
        block = storage.read_range(key, start, min(start + block_bytes, num_bytes))
        if facts.chunks:
            digests.append(hashlib.sha256(block).hexdigest())
        else:
            whole.update(block)
    return tuple(digests) == facts.chunks if facts.chunks else whole.hexdigest() == facts.sha256


def wrong_files(storage: Storage, key: str, contents: Contents, sizes: Mapping[str, int], *, read: bool) -> list[str]:
    """The files that are missing or not as ``contents`` say: by the ``sizes`` that were found, with ``read`` by every byte."""
    wrong = [name for name, facts in contents.files.items() if not _fits(sizes.get(name), facts)]
    if read:
        wrong += [
            name
            for name in contents.files
            if name not in wrong and not holds(storage, f"{key}/{name}", contents.files[name], sizes[name])
        ]
    return wrong


def _fits(size: int | None, facts: FileFacts) -> bool:
    return size is not None and facts.num_bytes in (None, size)


def _by_manifest(storage: Storage, key: str, name: str) -> Contents:
    where = f"{storage.root_url}/{key}/{name}"
    text, marker = storage.read(f"{key}/{name}"), storage.read(f"{key}/{MARKER}").decode(errors="replace")
    digests = check_manifest(text, marker, where)[FILES]
    files = {path: FileFacts(sha256=expected) for path, expected in digests.items()}
    if name == STORE_MANIFEST:
        files |= _shard_files(storage, key, digests)
    files[name] = FileFacts(num_bytes=len(text), sha256=marker.strip())
    return Contents(digest=marker.strip(), files=files)


def _shard_files(storage: Storage, key: str, digests: Mapping[str, str]) -> dict[str, FileFacts]:
    """The shards of a store, which its tables vouch for."""
    files = dict[str, FileFacts]()
    for path, expected in digests.items():
        if PurePosixPath(path).name == SHARDS:
            table, folder = _table(storage, f"{key}/{path}", expected), path.removesuffix(SHARDS)
            for shard in range(len(table)):
                files[f"{folder}{table.name(shard)}"] = FileFacts(
                    num_bytes=table.stored_bytes(shard), sha256=table.sha256(shard)
                )
    return files


def _table(storage: Storage, key: str, expected: str) -> ShardTable:
    where = f"{storage.root_url}/{key}"
    data = storage.read(key)
    if digest(data) != expected:
        raise IntegrityError("the bytes differ from their digest", where=where)
    return ShardTable.parse(data, where)


def _is_blob(path: Path) -> bool:
    """Whether a file of a Hugging Face cache has its sha256 for a name; small files there are named by another digest."""
    return path.parent.name == "blobs" and _BLOB.fullmatch(path.name) is not None
