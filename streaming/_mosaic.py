"""The seam to MosaicML's package, and the only file that imports it: MDS folders written by their ``MDSWriter``.

``mds`` reads such folders without this package: importing it takes 5 s of CPU and 260 MB, once for every loader worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from outgrow.errors import DataError
from outgrow.torchvision import ensure_importable

ensure_importable()

from streaming import MDSWriter  # noqa: E402
from streaming.base.hashing import get_hash, is_hash  # noqa: E402

Array: TypeAlias = npt.NDArray[Any]

DOCUMENTS = "documents.safetensors"
_MAX_DOCUMENT_BYTES = 2**32 - 2**20
"""MDS keeps offsets as uint32; leaves room for the header and the other columns."""


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
        if len(tokens) * self.dtype.itemsize > _MAX_DOCUMENT_BYTES:
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


def hash_hex(algorithm: str, data: bytes) -> str:
    """The hash that an MDS index may name besides those of hashlib (xxhash's). Raises ``DataError`` for an unknown name."""
    if not is_hash(algorithm):
        raise DataError(f"the index names an unknown hash, '{algorithm}'")
    return str(get_hash(algorithm, data))
