"""Files that are committed or absent: one small view of a folder or bucket (fsspec), durable writes, digests.

Datasets, checkpoints and run folders lie under one root, a local folder or any URL that fsspec opens (``s3://``, ``gs://``,
``memory://``). Keys are relative and use ``/``. Local writes are fsynced, file and folder, before they are renamed into place;
on a bucket an object appears whole or not at all by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from outgrow.errors import IntegrityError, UserError


class Storage:
    """A root folder or bucket prefix. All ``key`` arguments are relative to it; ``..`` and absolute keys are refused."""

    def __init__(self, root: str, options: Mapping[str, Any] | None = None) -> None:
        self.root_url = root
        fs, path = fsspec.core.url_to_fs(root, **dict(options or {}))
        self.fs: Any = fs
        self.root: str = path.rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)

    def path(self, key: str) -> str:
        """The path of ``key`` as the file system knows it; a local folder's is usable with ``open``."""
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts or "\0" in key:
            raise UserError(f"'{key}' is not a path below {self.root_url}")
        return f"{self.root}/{parts}" if key else self.root or "/"

    def exists(self, key: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(key)))

    def names(self, key: str) -> list[str]:
        """Names (not paths) directly below ``key``, sorted; empty where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(key), detail=False)
        except FileNotFoundError:
            return []
        paths = {str(entry).rstrip("/") for entry in entries} - {self.path(key)}
        return sorted(PurePosixPath(path).name for path in paths)

    def sizes(self, key: str) -> dict[str, int]:
        """Bytes of each file directly below ``key``, by name; empty where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(key), detail=True)
        except FileNotFoundError:
            return {}
        return {PurePosixPath(entry["name"]).name: int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def read(self, key: str) -> bytes:
        with self.fs.open(self.path(key), "rb") as file:
            return cast(bytes, file.read())

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of ``key``; fewer where the file ends before."""
        return cast(bytes, self.fs.cat_file(self.path(key), start=start, end=stop))

    def read_json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def open_write(self, key: str) -> BinaryIO:
        """A file opened for writing below a folder that is still aside; the caller makes it durable before it is renamed."""
        path = self.path(key)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "wb")
        return cast(BinaryIO, self.fs.open(path, "wb"))

    def write(self, key: str, data: bytes) -> None:
        """Write ``key`` whole or not at all, and durably. An existing file is replaced."""
        if self.is_local:
            path = Path(self.path(key))
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = _write_aside(path, data)
            os.replace(aside, path)
            sync_folder(path.parent)
        else:
            self.fs.pipe_file(self.path(key), data)

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    def create(self, key: str, data: bytes) -> bool:
        """Write ``key`` whole if it is not there yet; False where it is. Of many that try at once, one gets True.

        On a bucket that holds where the store has conditional put.
        """
        if self.is_local:
            return _create_local(Path(self.path(key)), data)
        if self.exists(key):
            return False
        try:
            self.fs.pipe_file(self.path(key), data, mode="create")
        except FileExistsError:
            return False
        return True

    def rename(self, source: str, target: str) -> None:
        """Move a folder. Atomic and durable on a local folder; on a bucket a copy on the server's side, then a delete."""
        old, new = self.path(source), self.path(target)
        if self.is_local:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            os.rename(old, new)
            sync_folder(Path(new).parent)
        else:
            # Not fs.mv(recursive=True): on S3 that also asks for the folders, which are no objects, and fails.
            self.fs.invalidate_cache()
            files = self.fs.find(old)
            self.fs.copy(files, [new + file.removeprefix(old) for file in files])
            self.fs.rm(old, recursive=True)

    def remove(self, key: str) -> None:
        """Delete a file or a folder and all below it; nothing where it is already gone."""
        if not key:
            raise ValueError("the root of a storage is never removed")
        if self.is_local:
            path = Path(self.path(key))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        elif self.exists(key):
            self.fs.rm(self.path(key), recursive=True)

    def free_bytes(self) -> int | None:
        """Free bytes on the disk of a local root (its nearest existing parent); None for a bucket, which has no such limit."""
        if not self.is_local:
            return None
        return shutil.disk_usage(nearest_folder(Path(self.root))).free

    def upload(self, local: Path, key: str) -> None:
        """Copy a local file to ``key``, durably."""
        if self.is_local:
            target = Path(self.path(key))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, target)
            sync_file(target)
        else:
            self.fs.put_file(str(local), self.path(key))

    def download(self, key: str, local: Path) -> None:
        """Copy ``key`` to a local file; the caller checks its digest."""
        local.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self.path(key), str(local))


def _write_aside(path: Path, data: bytes) -> Path:
    """A durable file beside ``path`` that holds ``data``, ready to be moved into place; nothing is left where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _create_local(path: Path, data: bytes) -> bool:
    aside = _write_aside(path, data)
    try:
        # A hard link appears with its whole content or fails where the name is taken; open(mode="x") shows an empty file first.
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    sync_folder(path.parent)
    return True


def nearest_folder(path: Path) -> Path:
    """``path`` or the nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    sync_file(path)


def sync_tree(root: Path) -> None:
    """Make every file and folder below ``root`` durable."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def digest(data: bytes | memoryview) -> str:
    """sha256 as lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """sha256 of a JSON value in its one canonical form (sorted keys, no spaces)."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def tree_digests(root: Path, *, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """sha256 of every file below ``root``, by relative path with ``/``."""
    skip = set(leave_out)
    return {key: file_digest(root / key) for key in _tree(root) if key not in skip}


def verify_tree(root: Path, digests: Mapping[str, str]) -> None:
    """Check every file that ``digests`` names. Raises ``IntegrityError`` with the first that is missing or differs."""
    for key, expected in digests.items():
        path = root / key
        if not path.is_file():
            raise IntegrityError("the file is missing", where=str(path))
        if file_digest(path) != expected:
            raise IntegrityError("the bytes differ from their digest", where=str(path))


def _tree(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            yield Path(folder, name).relative_to(root).as_posix()
