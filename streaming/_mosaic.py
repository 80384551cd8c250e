"""The seam to MosaicML's package, and the only file that imports it: MDS shards written by their ``MDSWriter``.

``mds`` reads such folders without this package: importing it takes 5 s of CPU and 260 MB, once for every loader worker.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.streaming.shards import ShardEntry, shard_name
from outgrow.torchvision import ensure_importable

ensure_importable()

from streaming import MDSWriter  # noqa: E402
from streaming.base.hashing import get_hash, is_hash  # noqa: E402

Array: TypeAlias = npt.NDArray[Any]

_MAX_DOCUMENT_BYTES = 2**32 - 2**20
"""MDS keeps offsets as uint32; leaves room for the header and the other columns."""


class _Writer(MDSWriter):
    """Theirs, but it numbers shards from ``first_shard`` on and leaves the folder's index to the caller."""

    def __init__(self, first_shard: int, **options: Any) -> None:
        super().__init__(**options)
        self._first_shard = first_shard

    @property
    def shard(self) -> int:
        """Number of the shard that the pending samples will be."""
        return self._first_shard + len(self.shards)

    def flush_shard(self) -> None:
        """Write the pending samples; theirs writes an empty shard before a first document that is larger than the limit."""
        if self.new_samples:
            super().flush_shard()

    def _name_next_shard(self, extension: str | None = None) -> tuple[str, str | None]:
        name = shard_name(self.shard, compressed=False)
        return name, shard_name(self.shard, compressed=True) if self.compression else None

    def _write_index(self) -> None:
        """A part of a folder has no index of its own."""


class DocumentWriter:
    """Shards of one split of one stream in ``folder``, a sample a document, numbered from ``first_shard`` on.

    Columns: ``tokens`` ndarray:uint16 (``vocab_size`` <= 65,536) or uint32; ``weights`` bytes (empty: all 1, else float32 of
    the tokens' length); ``spans`` bytes (empty, or int32 [2, 2]: start and stop of the chosen and of the rejected answer of a
    preference pair); ``source`` str; ``meta`` str (a JSON object).

    A context manager: leaving it normally writes what is pending, leaving it by an exception does not. ``folder`` must be
    absent or empty. ``shards`` then lists them as MosaicML's index does; nothing is fsynced.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        compression: Literal["none", "zstd"],
        shard_bytes: int,
        first_shard: int = 0,
    ) -> None:
        self.folder = folder
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)
        self._writer = _Writer(
            first_shard,
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
            max_workers=1,
        )

    @property
    def shards(self) -> list[ShardEntry]:
        """The shards that are written."""
        return list(self._writer.shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._writer.finish()
        else:
            self._writer.cancel_future_jobs()

    def write(
        self,
        tokens: Array,
        *,
        source: str,
        meta: str = "{}",
        weights: npt.NDArray[np.float32] | None = None,
        spans: npt.NDArray[np.int32] | None = None,
    ) -> int:
        """Add a document, and return the number of its shard.

        ``tokens`` integers [n] with n >= 1; ``weights`` float32 [n] is the loss weight of each token as a target (the first is
        never one), None for all 1; ``spans`` int32 [2, 2] of a preference pair; ``meta`` a JSON object.
        """
        if len(tokens) * self.dtype.itemsize + (0 if weights is None else 4 * len(tokens)) > _MAX_DOCUMENT_BYTES:
            raise DataError(f"a document of {len(tokens):,} tokens does not fit into an MDS shard (4 GiB)", where=source)
        self._writer.write(
            {
                "tokens": tokens.astype(self.dtype, copy=False),
                "weights": b"" if weights is None else weights.astype(np.float32, copy=False).tobytes(),
                "spans": b"" if spans is None else spans.astype(np.int32, copy=False).tobytes(),
                "source": source,
                "meta": meta,
            }
        )
        return self._writer.shard


def hash_hex(algorithm: str, data: bytes) -> str:
    """The hash that an MDS index may name besides those of hashlib (xxhash's). Raises ``DataError`` for an unknown name."""
    if not is_hash(algorithm):
        raise DataError(f"the index names an unknown hash, '{algorithm}'")
    return str(get_hash(algorithm, data))
