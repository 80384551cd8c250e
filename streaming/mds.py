"""Reads MDS folders: any that MosaicML's ``MDSWriter`` wrote, ours and foreign ones, through mapped memory and without a copy.

A foreign folder is not trusted. Names that lead elsewhere, links, pickle columns and counts that cannot be are refused; a shard
is checked against its digest once, before its first sample is used; and every offset is checked against the shard before it is
followed. The format: a shard is uint32 count, uint32 offsets [count + 1], a JSON header, samples; a sample is the uint32
sizes of its columns of variable size, then all columns in the order of their names.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from outgrow.errors import DataError, IntegrityError
from outgrow.streaming.mds_index import Column, File, Shard, Shards, header_columns, open_plain, read_index, read_our_shards

Array: TypeAlias = npt.NDArray[Any]
Int64: TypeAlias = npt.NDArray[np.int64]

_VALUE_TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
"""Element types of an ``ndarray``, which its encoding names or else its first byte."""


@dataclass(frozen=True)
class _OpenShard:
    """A mapped and checked shard: where each column of each sample starts and stops, int64 [samples] each."""

    data: memoryview
    columns: Mapping[str, Column]
    starts: Mapping[str, Int64]
    stops: Mapping[str, Int64]


class MdsFolder:
    """The samples of one MDS folder, numbered over its shards in their order.

    ``expected`` is the sha256 of ``shards.safetensors``, which holds that of every shard; where it is None (a folder that
    another program wrote) ``index.json`` is read, and the hashes that it declares are checked. At most ``open_shards`` shards
    stay mapped; a compressed shard is unpacked into an unnamed temporary file of the size that is declared. ``path_of`` gives
    the path of a shard's file by its name, asked each time that the file is mapped; None: in the folder itself. Files that it
    gives come and go, and are checked each time.

    Raises ``DataError`` for an index that is missing, malformed or hostile, ``IntegrityError`` for bytes that differ.
    """

    def __init__(
        self,
        folder: Path,
        expected: str | None = None,
        *,
        open_shards: int = 8,
        path_of: Callable[[str], Path] | None = None,
    ) -> None:
        self.folder = folder
        self._come_and_go = path_of is not None
        self._path_of = path_of or folder.joinpath
        self._shards: Shards = read_index(folder) if expected is None else read_our_shards(folder, expected)
        self._ends = self._shards.ends.data  # its items are Python's own integers, which bisect fast
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._open_shards = open_shards
        self._verified = np.zeros(len(self._ends), np.int64)
        self._files: dict[int, tuple[Path, int]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def encodings(self) -> dict[str, str]:
        """MDS encoding by column name, of the first shard; empty where there is none."""
        if not len(self._ends):
            return {}
        columns = self._shards.shard(0).columns or self._opened(0).columns
        return {column.name: column.encoding for column in columns.values()}

    def column(self, sample: int, name: str) -> Any:
        """One column of one sample: an array for ``ndarray``, ``str`` or ``bytes``; other encodings are not read.

        An array is a read-only view into the shard and keeps it mapped.
        """
        number = self.shard_of(sample)
        opened = self._opened(number)
        row = sample - (self._ends[number - 1] if number else 0)
        try:
            return decode(opened.columns[name].encoding, opened.data[opened.starts[name][row] : opened.stops[name][row]])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            where = str(self.folder / self._shards.shard(number).raw.name)
            raise DataError(f"column '{name}' of sample {row} cannot be read: {error}", where=where) from None

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect.bisect_right(self._ends, sample)

    def close_replaced(self) -> None:
        """Unmap the shards whose file is gone or changed since, which frees its room, and has it checked where it is back."""
        for number in list(self._open):
            path, identity = self._files[number]
            try:
                same = _identity(os.stat(path)) == identity
            except OSError:
                same = False
            if not same:
                del self._open[number]

    def _opened(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._shards.shard(number)
        opened = _locate_columns(self._map(number, shard), shard, str(self.folder / shard.raw.name))
        self._open[number] = opened
        if len(self._open) > self._open_shards:
            self._open.popitem(last=False)
        return opened

    def _map(self, number: int, shard: Shard) -> memoryview:
        """The uncompressed bytes of a shard, checked; hashing is skipped where the very same file was checked before."""
        # A foreign folder may keep both files.
        packed = shard.zipped is not None and (shard.zipped_alone or not self._path_of(shard.raw.name).exists())
        file = shard.zipped if shard.zipped is not None and packed else shard.raw
        path = self._path_of(file.name)
        data, identity = _map_file(path, file)
        if self._come_and_go or self._verified[number] != identity:
            _check(data, path, file.hashes)
            self._verified[number] = identity
        self._files[number] = path, identity
        return _unpack(data, shard.raw.num_bytes, path) if packed else data


def decode(encoding: str, data: memoryview) -> Any:
    """A column's value. Raises ``ValueError``, ``TypeError``, ``KeyError`` or ``IndexError`` where ``data`` holds none."""
    if encoding == "bytes":
        return bytes(data)
    if encoding == "str":
        return str(data, "utf-8")
    kind, *details = encoding.split(":")
    if kind != "ndarray":
        raise ValueError(f"its encoding is '{encoding}'; read are: ndarray, bytes, str")
    at = 0
    if details and details[0] not in _VALUE_TYPES.values():  # numpy would parse whatever it is as an expression
        raise ValueError(f"its elements are '{details[0]}'; read are: {', '.join(_VALUE_TYPES.values())}")
    if details:
        dtype = np.dtype(details[0])
    else:
        dtype, at = np.dtype(_VALUE_TYPES[data[0]]), 1
    if len(details) > 1:
        shape = tuple(int(length) for length in details[1].split(","))
    else:
        dims, width = data[at] >> 2, 1 << data[at] % 4  # one byte: how many dimensions, and log2 of the bytes of each
        shape = tuple(np.frombuffer(data, f"<u{width}", dims, at + 1).tolist())
        at += 1 + dims * width
    return np.frombuffer(data, dtype, offset=at).reshape(shape)


def _map_file(path: Path, file: File) -> tuple[memoryview, int]:
    """The mapped bytes of a plain file, and a number, not 0, that tells whether it is still the same file."""
    in_memory = path.is_relative_to("/proc")  # of another process: a link of the kernel's, for as long as it is held
    try:
        fd = os.open(path, os.O_RDONLY) if in_memory else open_plain(path)
    except OSError as error:
        if not in_memory and not isinstance(error, FileNotFoundError):
            raise
        raise IntegrityError("the shard is missing", where=str(path)) from None
    try:
        stat = os.fstat(fd)
        if stat.st_size != file.num_bytes:
            raise IntegrityError(f"the shard has {stat.st_size:,} bytes, its index says {file.num_bytes:,}", where=str(path))
        mapped = memoryview(mmap.mmap(fd, file.num_bytes, access=mmap.ACCESS_READ))
        return mapped, _identity(stat)
    finally:
        os.close(fd)


def _identity(stat: os.stat_result) -> int:
    return hash((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)) or 1


def _check(data: memoryview, path: Path, hashes: Mapping[str, str]) -> None:
    for algorithm, expected in hashes.items():
        if algorithm in hashlib.algorithms_guaranteed:
            found = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
        else:
            from outgrow.streaming._mosaic import hash_hex  # heavy, and only some foreign folders need it

            found = hash_hex(algorithm, bytes(data))
        if found != expected:
            raise IntegrityError(f"the bytes differ from their {algorithm} digest", where=str(path))


def _unpack(data: memoryview, size: int, path: Path) -> memoryview:
    """The ``size`` bytes of a zstd frame, in an unnamed file that the kernel may write out when memory is short."""
    with tempfile.TemporaryFile(prefix="outgrow-shard-") as file, zstandard.ZstdDecompressor().stream_reader(data) as reader:
        left = size
        try:
            while left and (piece := reader.read(min(left, 2**20))):
                file.write(piece)
                left -= len(piece)
            if left or reader.read(1):
                raise IntegrityError(
                    f"the shard does not unpack to the {size:,} bytes that its index declares", where=str(path)
                )
        except zstandard.ZstdError as error:
            raise IntegrityError(f"the shard is not a zstd frame: {error}", where=str(path)) from None
        file.flush()
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def _locate_columns(data: memoryview, shard: Shard, where: str) -> _OpenShard:
    """Where the columns of every sample lie, once their sizes are found to fill each sample, and the samples the shard."""
    contradiction = DataError("the offsets of the shard contradict its index or its size", where=where)
    flat = np.frombuffer(data, np.uint8)
    count = int(np.frombuffer(data, "<u4", 1)[0])
    if count != shard.samples or 4 * (count + 2) > len(data):
        raise contradiction
    stored = np.frombuffer(data, "<u4", count + 1, 4)
    if int(stored[0]) < 4 * (count + 2) or int(stored[-1]) > len(data):
        raise contradiction  # before memory is taken for so many
    bounds = stored.astype(np.int64)
    begins, ends = bounds[:-1], bounds[1:]
    columns = shard.columns or _columns_of(data[4 * (count + 2) : bounds[0]], where)
    cursor = begins + 4 * sum(column.size is None for column in columns.values())
    if np.any(cursor > ends):
        raise contradiction
    header = 0
    starts: dict[str, Int64] = {}
    stops: dict[str, Int64] = {}
    for name, column in columns.items():
        if column.size is None:
            sizes = flat[begins[:, None] + (header + np.arange(4))].view("<u4")[:, 0].astype(np.int64)
            header += 4
        else:
            sizes = np.full(count, column.size, np.int64)
        starts[name] = cursor
        stops[name] = cursor = cursor + sizes
    if np.any(cursor != ends):
        raise contradiction
    return _OpenShard(data, columns, starts, stops)


def _columns_of(header: memoryview, where: str) -> dict[str, Column]:
    try:
        return header_columns(bytes(header))
    except ValueError as error:
        raise DataError(f"the header of the shard does not tell its columns: {error}", where=where) from None
