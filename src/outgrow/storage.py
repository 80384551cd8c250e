"""Files that are committed or absent: one small view of a folder or bucket (fsspec), durable writes, digests.

Datasets, checkpoints and run folders lie under one root, a local folder or any URL that fsspec opens (``s3://``, ``gs://``,
``memory://``). Keys are relative and use ``/``. Local writes are fsynced, file and folder, before they are renamed into place;
on a bucket an object appears whole or not at all by itself. What is asked of a bucket is asked again after failures that pass,
within bounded time (``retry``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from outgrow import retry
from outgrow.errors import IntegrityError, SiteError, UserError
from outgrow.multipart import MultipartWriter
from outgrow.record import Record
from outgrow.retry import PATIENCE, Patience

T = TypeVar("T")
R = TypeVar("R", bound=Record)

BLOCK_BYTES = 8 << 20
"""What is read of a bucket at once: little enough to ask for again, so much that the time to the first byte is small beside."""
CONNECT_S = 10
READ_S = 30
"""Longest silence of a connection, seconds."""
_ANSWER_S = (10.0, 60.0)
"""Least and most time for an answer to begin; between them as much as the patience is."""
_SLOWEST_BYTES_PER_S = 64_000
"""A request whose bytes come more slowly is broken off and made again."""
_ABORT_S = 10.0
_PARALLEL = 8


class Storage:
    """A root folder or bucket prefix. All ``key`` arguments are relative to it; ``..`` and absolute keys are refused.

    On a bucket every method raises ``retry.Unreachable`` where failures that pass did not pass within ``patience``, and
    ``SiteError`` where access is denied.
    """

    def __init__(self, root: str, options: Mapping[str, Any] | None = None) -> None:
        self.root_url = root
        fs, path = fsspec.core.url_to_fs(root, **_with_timeouts(root, options or {}))
        self.fs: Any = fs
        self.root: str = path.rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)
        self.patience = PATIENCE
        self._is_s3 = "s3" in fs.protocol
        if self._is_s3:
            fs.retries = 1  # `retry` alone decides; one loop within another would multiply the time

    def with_patience(self, total_s: float) -> Self:
        """The same place, given up after ``total_s`` seconds instead; a request that is under way may take a little longer."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.patience = Patience(total_s=total_s)
        return other

    def path(self, key: str) -> str:
        """The path of ``key`` as the file system knows it; a local folder's is usable with ``open``."""
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts or "\0" in key:
            raise UserError(f"'{key}' is not a path below {self.root_url}")
        return f"{self.root}/{parts}" if key else self.root or "/"

    def exists(self, key: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self._ask("look for", key, lambda: self._bounded("exists", self.path(key))))

    def size(self, key: str) -> int:
        """Bytes of a file. Raises ``FileNotFoundError`` where there is none."""
        self.fs.invalidate_cache()
        return int(self._ask("look for", key, lambda: self._bounded("info", self.path(key)))["size"])

    def names(self, key: str) -> list[str]:
        """Names (not paths) directly below ``key``, sorted; empty where there is no such folder."""
        if self.is_local:
            return sorted(entry.name for entry in _entries(self.path(key)))
        paths = {entry["name"].rstrip("/") for entry in self._list(key)} - {self.path(key)}
        return sorted(PurePosixPath(path).name for path in paths)

    def sizes(self, key: str) -> dict[str, int]:
        """Bytes of each file directly below ``key``, by name; empty where there is no such folder."""
        if self.is_local:
            files = [(entry.name, _file_bytes(entry)) for entry in _entries(self.path(key))]
            return {name: num_bytes for name, num_bytes in files if num_bytes is not None}
        return {PurePosixPath(entry["name"]).name: int(entry["size"]) for entry in self._list(key) if entry["type"] == "file"}

    def read(self, key: str) -> bytes:
        """All of a file, in one piece: of one that is replaced meanwhile, the old or the new."""
        if self.is_local:
            return Path(self.path(key)).read_bytes()
        num_bytes = self.size(key)
        return cast(bytes, self._ask("read", key, lambda: self._bounded("cat_file", self.path(key), num_bytes=num_bytes)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of ``key``; fewer where the file ends before."""
        return self._ask("read", key, lambda: self.ask_range(key, start, stop))

    def ask_range(self, key: str, start: int, stop: int, timeout_s: float | None = None) -> bytes:
        """``read_range`` in one attempt, broken off after ``timeout_s``; failures as the file system raises them."""
        path, num_bytes = self.path(key), stop - start
        try:
            return cast(bytes, self._bounded("cat_file", path, start=start, end=stop, num_bytes=num_bytes, timeout_s=timeout_s))
        except OSError as error:
            if retry.status_of(error) == 416:  # the range lies behind the end
                return b""
            raise

    def blocks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """A file that stays as it is meanwhile, from ``start``, in blocks of ``BLOCK_BYTES``; the last one is shorter."""
        num_bytes = self.size(key)
        for at in range(start, num_bytes, BLOCK_BYTES):
            yield self.read_range(key, at, min(at + BLOCK_BYTES, num_bytes))

    def read_json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def read_records(self, key: str, kind: type[R], *, hint: str) -> list[R]:
        """The records of a folder of JSON files, in the order of their names; none where there is no folder.

        Names that begin with a dot are passed over: a writer that was killed left them aside. Raises ``IntegrityError`` with
        ``hint`` for a file that is no such record.
        """
        found = []
        for name in self.names(key):
            if name.startswith("."):
                continue
            file = f"{key}/{name}"
            try:
                found.append(kind.from_dict(self.read_json(file)))
            except (ValueError, TypeError, AttributeError) as error:
                raise IntegrityError(f"this is no {kind.__name__}: {error}", where=file, hint=hint) from None
        return found

    def open_write(self, key: str) -> BinaryIO:
        """A file opened for writing below a folder that is still aside; the caller makes it durable before it is renamed."""
        path = self.path(key)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "wb")
        if self._is_s3:
            brief = self.with_patience(_ABORT_S)

            def request(method: str, **arguments: Any) -> Any:
                # Giving up must not take as long again as the trying that led to it.
                asked = brief if method == "abort_multipart_upload" else self
                return asked._request(key, method, **arguments)

            return cast(BinaryIO, MultipartWriter(request))
        return cast(BinaryIO, self._ask("write", key, lambda: self.fs.open(path, "wb")))

    def write(self, key: str, data: bytes) -> None:
        """Write ``key`` whole or not at all, and durably. An existing file is replaced."""
        if self.is_local:
            path = Path(self.path(key))
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = _write_aside(path, data)
            with _synced_after(path.parent):
                os.replace(aside, path)
        else:
            self._ask("write", key, lambda: self._bounded("pipe_file", self.path(key), data, num_bytes=len(data)))

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    def create(self, key: str, data: bytes) -> bool:
        """Write ``key`` whole if it is not there yet; False where it is. Of many that try at once, one gets True.

        On a bucket that holds where the store has conditional put, and where ``data`` tells its writer from any other: a name
        that was free and is taken now is ours if it holds ``data``, for the answer to a first attempt may have been lost.
        """
        if self.is_local:
            return _create_local(Path(self.path(key)), data)
        if self.exists(key):
            return False

        def put() -> bool:
            try:
                self._bounded("pipe_file", self.path(key), data, mode="create", num_bytes=len(data))
            except Exception as error:
                if not retry.is_taken(error):
                    raise
                return bool(self._bounded("cat_file", self.path(key), num_bytes=len(data)) == data)
            return True

        return self._ask("write", key, put)

    def rename(self, source: str, target: str) -> None:
        """Move a folder. Atomic and durable on a local folder; on a bucket a copy on the server's side, then a delete."""
        old, new = self.path(source), self.path(target)
        if self.is_local:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            os.rename(old, new)
            sync_folder(Path(new).parent)
            return
        # Not fs.mv(recursive=True): on S3 that also asks for the folders, which are no objects, and fails.
        sizes = self._files(source)

        def copy(file: str) -> None:
            names = (file, new + file.removeprefix(old))
            self._ask("copy", source, lambda: self._bounded("cp_file", *names, num_bytes=sizes[file]))

        _each(copy, sizes)
        self.remove(source)

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
        elif self.fs.async_impl:
            # File by file: s3fs passes over what a request for many could not delete, and takes a * in a name for a pattern.
            _each(lambda file: self._ask("delete", key, lambda: self._bounded("rm_file", file)), self._files(key))
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
        elif self._is_s3:
            with open(local, "rb") as file, self.open_write(key) as out:
                shutil.copyfileobj(file, out, BLOCK_BYTES)
        else:
            num_bytes = local.stat().st_size
            self._ask("write", key, lambda: self._bounded("put_file", str(local), self.path(key), num_bytes=num_bytes))

    def download(self, key: str, local: Path) -> None:
        """Copy ``key`` to a local file; the caller checks its digest."""
        local.parent.mkdir(parents=True, exist_ok=True)
        if self.is_local:
            shutil.copyfile(self.path(key), local)
            return
        with open(local, "wb") as file:
            for block in self.blocks(key):
                file.write(block)

    def _list(self, key: str) -> list[dict[str, Any]]:
        self.fs.invalidate_cache()
        try:
            return list(self._ask("list", key, lambda: self._bounded("ls", self.path(key), detail=True)))
        except FileNotFoundError:
            return []

    def _files(self, key: str) -> dict[str, int]:
        """Bytes of every file below ``key``, or of the file itself, by its path."""
        self.fs.invalidate_cache()
        found = self._ask("list", key, lambda: self._bounded("find", self.path(key), detail=True))
        return {path: int(entry["size"]) for path, entry in found.items()}

    def _request(self, key: str, method: str, *, num_bytes: int = 0, **arguments: Any) -> Any:
        """One request of the S3 interface for the object ``key``."""
        bucket, name, _ = self.fs.split_path(self.path(key))
        asked = {"Bucket": bucket, "Key": name, **arguments}
        return self._ask("write", key, lambda: self._bounded("call_s3", method, num_bytes=num_bytes, **asked))

    def _ask(self, verb: str, key: str, action: Callable[[], T]) -> T:
        """``action``, called again after failures that pass; at once on a local folder."""
        if self.is_local:
            return action()
        try:
            return retry.call(action, what=f"{verb} {key or 'it'}", where=self.root_url, patience=self.patience)
        except FileNotFoundError:
            if verb in ("write", "copy"):
                raise SiteError("there is no such bucket", where=self.root_url, hint="make it first, or give another") from None
            raise

    def _bounded(self, method: str, *arguments: Any, num_bytes: int = 0, timeout_s: float | None = None, **options: Any) -> Any:
        """What a method of the file system returns; one that talks to a server is cancelled when its time is up."""
        if not self.fs.async_impl:
            return getattr(self.fs, method)(*arguments, **options)
        answer_s = min(max(self.patience.total_s, _ANSWER_S[0]), _ANSWER_S[1])
        allowed_s = answer_s + num_bytes / _SLOWEST_BYTES_PER_S if timeout_s is None else timeout_s
        return fsspec.asyn.sync(self.fs.loop, getattr(self.fs, f"_{method}"), *arguments, timeout=allowed_s, **options)


def _with_timeouts(root: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for fsspec: on S3 with timeouts, and without botocore's own attempts, where none are given."""
    if not root.startswith(("s3://", "s3a://")):
        return dict(options)
    ours = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"mode": "standard", "total_max_attempts": 1}}
    return {**options, "config_kwargs": {**ours, **options.get("config_kwargs", {})}}


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _file_bytes(entry: os.DirEntry[str]) -> int | None:
    """Size of a file; None for anything else, and for one that was removed since the folder was read."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except FileNotFoundError:
        return None


def _each(action: Callable[[str], None], names: Iterable[str]) -> None:
    """``action`` for every name, some at a time; raises the first error when all have ended."""
    with ThreadPoolExecutor(_PARALLEL) as pool:
        done = [pool.submit(action, name) for name in names]
    for each in done:
        each.result()


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


@contextmanager
def _synced_after(folder: Path) -> Iterator[None]:
    """Sync ``folder`` after a name in it has changed, by a descriptor from before: it may be moved as soon as that is seen."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        yield
        os.fsync(fd)
    finally:
        os.close(fd)


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
