"""Source ``mds``: token ids that MosaicML's MDSWriter wrote (llm-foundry), one document a sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.recipes.schema.sources import MdsSource
from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import Document, Dropped
from outgrow.streaming.sources.documents import units_of
from outgrow.streaming.sources.files import find_files
from outgrow.streaming.sources.reading import Files, stored_bytes


def _documents(root: Path, column: str) -> Iterator[Document | Dropped]:
    """Shards are read in the parent process, where each is opened and checked once."""
    folder = MdsFolder(root)
    for sample in range(len(folder)):
        source = f"{root.name}#{sample}"
        token_ids = _token_ids(folder.column(sample, column), source)
        if len(token_ids):
            yield Document(content=token_ids, source=source)
        else:
            yield Dropped(source=source, reason="empty", detail="it has no token ids")


def _token_ids(value: Any, where: str) -> npt.NDArray[np.int64]:
    """int64 [n] from a decoded column: an array of integers, or bytes of int64."""
    if isinstance(value, bytes) and len(value) % 8 == 0:
        return np.frombuffer(value, np.int64)
    if isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.integer):
        return value.astype(np.int64)
    raise DataError(f"token ids are a row of integers or bytes of int64, not {_described(value)}", where=where)


def _described(value: Any) -> str:
    return (
        f"an array {value.dtype}{list(value.shape)}"
        if isinstance(value, np.ndarray)
        else f"a value of type {type(value).__name__}"
    )


def open_mds(stream: str, source: MdsSource, root: str, digests: DigestCache) -> Files:
    """The source in the folder ``root``.

    Raises ``DataError`` where the folder has no index, a hostile one, or no integer column of that name.
    """
    found = find_files(stream, root, ("*",), ())
    folder = Path(root).expanduser()
    encodings = MdsFolder(folder).encodings
    if not encodings:
        raise DataError(f"stream '{stream}': the MDS folder holds no samples", where=str(folder))
    encoding = encodings.get(source.column)
    if encoding is None or not (encoding == "bytes" or encoding.startswith("ndarray")):
        columns = ", ".join(f"{name} ({code})" for name, code in sorted(encodings.items()))
        raise DataError(
            f"stream '{stream}': there is no column '{source.column}' of token ids; columns: {columns}",
            where=str(folder),
            hint="set the source's column",
        )
    return Files(
        found.files,
        digests,
        make_units=lambda: units_of(_documents(folder, source.column)),
        text_bytes=stored_bytes,
        read_as=stored_bytes.__module__,
    )
