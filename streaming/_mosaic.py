"""The seam to MosaicML's package, and the only file that imports it: MDS folders written and read.

``DocumentWriter`` wraps their ``MDSWriter`` and adds what a row index needs; ``MdsFolder`` reads any MDS folder through their
``MDSReader`` (which parses the index) and their column decoders. A folder is not trusted: names that lead elsewhere, links,
pickle columns and counts that cannot be are refused, and a shard is mapped into memory and checked against its sha256 once,
before its first sample is used.
"""

from __future__ import annotations

import bisect
import errno
import json
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import zstandard
from safetensors.numpy import save_file

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import digest
from outgrow.torchvision import ensure_importable

ensure_importable()

from streaming import MDSWriter  # noqa: E402
from streaming.base.format.mds.encodings import mds_decode  # noqa: E402
from streaming.base.format.mds.reader import MDSReader  # noqa: E402
from streaming.base.hashing import get_hash, is_hash  # noqa: E402

Array: TypeAlias = npt.NDArray[Any]

DOCUMENTS = "documents.safetensors"
INDEX = "index.json"
_MAX_SHARD_BYTES = 2**32
"""MDS keeps offsets as uint32."""
_MAX_INDEX_BYTES = 2**30


# --- writing ----------------------------------------------------------------------------------------------------------


class _Writer(MDSWriter):
    def flush_shard(self) -> None:
        """Write the pending samples; theirs writes an empty shard before a first document that is larger than the limit."""
        if self.new_samples:
            super().flush_shard()


class DocumentWriter:
    """One split of one stream: an MDS folder, a sample a document, and ``documents.safetensors`` beside its index.

    Columns: ``tokens`` ndarray:uint16 (``vocab_size`` <= 65,536) or uint32; ``weights`` bytes (empty: all 1, else float32 of
    the tokens' length); ``spans`` bytes (int32 pairs); ``source`` str; ``meta`` str (a JSON object).
    ``documents.safetensors``: ``lengths`` int64[N]; ``shard`` int32[N], number of the document's shard in index.json;
    ``weight`` float64[N], sum of the loss weights of the document's targets, that is of all tokens but the first; ``uniform``
    bool[N], true where every weight is 1.

    A context manager: leaving it normally finishes the folder, leaving it by an exception does not. The folder must be absent
    or empty; nothing is fsynced (the caller makes the whole store durable before it renames it).
    """

    def __init__(self, folder: Path, *, vocab_size: int, compression: Literal["none", "zstd"], shard_bytes: int) -> None:
        self.folder = folder
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)
        self._writer = _Writer(
            columns={
                "tokens": f"ndarray:{self.dtype.name}",
                "weights": "bytes",
                "spans": "bytes",
                "source": "str",
                "meta": "str",
            },
            out=str(folder),
            compression=None if compression == "none" else compression,
            hashes=["sha256"],
            size_limit=shard_bytes,
        )
        self._lengths: list[int] = []
        self._shards: list[int] = []
        self._weights: list[float] = []
        self._uniform: list[bool] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self._writer.cancel_future_jobs()

    def write(
        self,
        tokens: Array,
        *,
        source: str,
        meta: Mapping[str, Any] | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        spans: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Add a document: ``tokens`` integers [n] with n >= 1, ending with the end-of-text token; ``weights`` float32 [n] is
        the loss weight of each token as a target (the first is never one), None for all 1; ``spans`` int32 [k, 2]."""
        if len(tokens) * self.dtype.itemsize > _MAX_SHARD_BYTES - 2**20:
            raise DataError(f"a document of {len(tokens):,} tokens does not fit into an MDS shard (4 GiB)", where=source)
        uniform = weights is None or bool(np.all(weights == 1))
        self._writer.write(
            {
                "tokens": tokens.astype(self.dtype, copy=False),
                "weights": b"" if uniform or weights is None else weights.astype(np.float32, copy=False).tobytes(),
                "spans": b"" if spans is None else spans.astype(np.int32, copy=False).tobytes(),
                "source": source,
                "meta": json.dumps(dict(meta or {}), sort_keys=True, ensure_ascii=False),
            }
        )
        self._lengths.append(len(tokens))
        self._shards.append(len(self._writer.shards))
        self._uniform.append(uniform)
        self._weights.append(len(tokens) - 1 if uniform or weights is None else float(weights[1:].sum(dtype=np.float64)))

    def finish(self) -> None:
        """Write what is pending, ``index.json`` and ``documents.safetensors``."""
        self._writer.finish()
        save_file(
            {
                "lengths": np.asarray(self._lengths, np.int64),
                "shard": np.asarray(self._shards, np.int32),
                "weight": np.asarray(self._weights, np.float64),
                "uniform": np.asarray(self._uniform, np.bool_),
            },
            self.folder / DOCUMENTS,
        )


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenShard:
    """A mapped and checked shard: where each column of each sample starts and stops, int64 [samples] each."""

    data: memoryview
    starts: Mapping[str, npt.NDArray[np.int64]]
    stops: Mapping[str, npt.NDArray[np.int64]]


class MdsFolder:
    """The samples of one MDS folder, numbered over its shards in the order of ``index.json``.

    ``digests`` is sha256 by file name and must name every file that is read; where it is None (a folder that another program
    wrote) the hashes that the index itself declares are checked. At most ``open_shards`` shards stay mapped; a compressed
    shard is unpacked into an unnamed temporary file of the size that the index declares.

    Raises ``DataError`` for an index that is missing, malformed or hostile, ``IntegrityError`` for bytes that differ.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str] | None = None, *, open_shards: int = 8) -> None:
        self.folder = folder
        self._digests = digests
        self._shards = _read_index(folder, None if digests is None else digests.get(INDEX))
        self._ends = np.cumsum([shard.samples for shard in self._shards], dtype=np.int64).tolist()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._open_shards = open_shards
        self._verified: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def encodings(self) -> dict[str, str]:
        """MDS encoding by column name, of the first shard; empty where there is none."""
        first = self._shards[:1]
        return {name: code for shard in first for name, code in zip(shard.column_names, shard.column_encodings, strict=True)}

    def column(self, sample: int, name: str) -> Any:
        """One column of one sample, decoded. An ``ndarray`` is a read-only view into the shard and keeps it mapped."""
        number = bisect.bisect_right(self._ends, sample)
        shard = self._shards[number]
        opened = self._open_shard(number)
        row = sample - (self._ends[number] - shard.samples)
        try:
            encoding = shard.column_encodings[shard.column_names.index(name)]
            data = opened.data[opened.starts[name][row] : opened.stops[name][row]]
            # Their ndarray decoder takes any buffer, so the tokens stay where they are: no copy, however long the document.
            return mds_decode(encoding, cast(bytes, data) if encoding.startswith("ndarray") else bytes(data))
        except (ValueError, KeyError, IndexError) as error:
            where = str(self.folder / shard.raw_data.basename)
            raise DataError(f"column '{name}' of sample {row} cannot be decoded: {error}", where=where) from None

    def sample(self, sample: int) -> dict[str, Any]:
        """All columns of one sample, decoded."""
        return {name: self.column(sample, name) for name in self.encodings}

    def _open_shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        opened = _locate_columns(self._map(number), self._shards[number])
        self._open[number] = opened
        if len(self._open) > self._open_shards:
            self._open.popitem(last=False)
        return opened

    def _map(self, number: int) -> memoryview:
        """The uncompressed bytes of a shard, checked; hashing is skipped where the very same file was checked before."""
        shard = self._shards[number]
        raw, zipped = shard.raw_data, shard.zip_data
        # A foreign folder may keep both files; what outgrow wrote has the compressed one alone.
        packed = zipped if zipped and (self._digests is not None or not (self.folder / raw.basename).exists()) else None
        info = packed or raw
        path = self.folder / info.basename
        data, identity = _map_file(path, info.bytes)
        if self._verified.get(number) != identity:
            _check(data, path, info.hashes if self._digests is None else {"sha256": self._digests.get(info.basename, "")})
            self._verified[number] = identity
        return _unpack(data, raw.bytes, path) if packed else data


def _map_file(path: Path, size: int) -> tuple[memoryview, tuple[int, ...]]:
    """The mapped bytes of a plain file of ``size`` bytes, and what tells whether it is still the same file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise IntegrityError("the shard is missing", where=str(path)) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DataError("a shard may not be a link", where=str(path)) from None
    try:
        stat = os.fstat(fd)
        if stat.st_size != size:
            raise IntegrityError(f"the shard has {stat.st_size:,} bytes, its index says {size:,}", where=str(path))
        return memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ)), (
            stat.st_dev,
            stat.st_ino,
            stat.st_size,
            stat.st_mtime_ns,
        )
    finally:
        os.close(fd)


def _check(data: memoryview, path: Path, hashes: Mapping[str, str]) -> None:
    for algorithm, expected in hashes.items():
        if not is_hash(algorithm):
            raise DataError(f"the index names an unknown hash, {algorithm}", where=str(path))
        if get_hash(algorithm, cast(bytes, data)) != expected:
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


def _locate_columns(data: memoryview, shard: MDSReader) -> _OpenShard:
    """Where the columns lie. MDS: uint32 count, uint32 offsets [count + 1], header; a sample is the uint32 sizes of its
    variable columns, then all columns. Every size is checked against its sample, every sample against the shard."""
    flat = np.frombuffer(data, np.uint8)
    count = int(np.frombuffer(data, "<u4", 1)[0])
    bounds = np.frombuffer(data, "<u4", shard.samples + 1, 4).astype(np.int64)
    variable = [not size for size in shard.column_sizes]
    begins, ends = bounds[:-1], bounds[1:]
    cursor = begins + 4 * sum(variable)
    whole = count == shard.samples and bounds[0] >= 4 * (count + 2) and bounds[-1] <= len(data) and bool(np.all(cursor <= ends))
    starts, stops = {}, {}
    if whole:
        header = 0
        for name, size in zip(shard.column_names, shard.column_sizes, strict=True):
            if size:
                sizes = np.full(count, size, np.int64)
            else:
                sizes = flat[begins[:, None] + (header + np.arange(4))].view("<u4")[:, 0].astype(np.int64)
                header += 4
            starts[name] = cursor
            stops[name] = cursor = cursor + sizes
        whole = bool(np.all(cursor == ends))
    if not whole:
        raise DataError(
            "the offsets of the shard contradict its index or its size", where=str(Path(shard.dirname, shard.raw_data.basename))
        )
    return _OpenShard(data, starts, stops)


# --- the index of a folder that may be hostile ------------------------------------------------------------------------


def _read_index(folder: Path, expected: str | None) -> list[MDSReader]:
    """The shards that ``index.json`` lists, refused unless each is a plain MDS file of this folder."""
    path = folder / INDEX
    if not path.is_file():
        raise DataError("there is no MDS index", where=str(path), hint="an MDS folder holds index.json and its shards")
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise DataError(f"the index is larger than {_MAX_INDEX_BYTES:,} bytes", where=str(path))
    text = path.read_bytes()
    if expected is not None and digest(text) != expected:
        raise IntegrityError("the bytes differ from their digest", where=str(path))
    try:
        shards = [MDSReader.from_json(str(folder), None, entry) for entry in json.loads(text)["shards"]]
        problem = _problem(shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"not an MDS index of version 2 ({type(error).__name__}: {error})"
    if problem:
        raise DataError(problem, where=str(path))
    return shards


def _problem(shards: Sequence[MDSReader]) -> str:
    """What is wrong with the shards of an index; empty where they can be read."""
    seen: set[str] = set()
    for shard in shards:
        shard.validate(allow_unsafe_types=False)
        for info in filter(None, (shard.raw_data, shard.zip_data)):
            name = info.basename
            if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
                return f"shard name {name!r} is not a file of this folder"
            if name in seen:
                return f"shard name {name!r} is listed twice"
            seen.add(name)
            if not isinstance(info.bytes, int) or not 8 <= info.bytes <= _MAX_SHARD_BYTES:
                return f"{name}: {info.bytes!r} bytes cannot be the size of an MDS shard"
        if not isinstance(shard.samples, int) or not 0 <= 4 * (shard.samples + 2) <= shard.raw_data.bytes:
            return f"{shard.raw_data.basename}: {shard.samples!r} samples do not fit into {shard.raw_data.bytes} bytes"
        if (shard.compression or "zstd").split(":")[0] != "zstd":
            return f"{shard.raw_data.basename}: compression {shard.compression!r} is not supported; allowed: none, zstd"
        if (
            not len(set(shard.column_names))
            == len(shard.column_names)
            == len(shard.column_encodings)
            == len(shard.column_sizes)
        ):
            return f"{shard.raw_data.basename}: column names, encodings and sizes do not match"
        if not all(size is None or (isinstance(size, int) and size >= 0) for size in shard.column_sizes):
            return f"{shard.raw_data.basename}: column sizes {shard.column_sizes} are not sizes"
    return ""
