"""Source ``mds``: token ids that MosaicML's MDSWriter wrote (llm-foundry), one document a sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.errors import DataError
from outgrow.recipes.schema.data import MdsSource
from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import Document, Input, Skipped
from outgrow.streaming.sources.documents import DocumentsUnit, units_of
from outgrow.streaming.sources.files import InputFiles, find_files


class MdsDocuments:
    """The opened source. Shards are read in the parent process, where each is opened and checked once."""

    def __init__(self, source: MdsSource, folder: Path, files: InputFiles) -> None:
        self._source = source
        self._folder = folder
        self._files = files

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self._files.inputs

    def check_unchanged(self) -> None:
        self._files.check_unchanged()

    def units(self) -> Iterator[DocumentsUnit]:
        return units_of(self._documents())

    def _documents(self) -> Iterator[Document | Skipped]:
        folder = MdsFolder(self._folder)
        for sample in range(len(folder)):
            source = f"{self._folder.name}#{sample}"
            token_ids = _token_ids(folder.column(sample, self._source.column), source)
            yield Document(token_ids=token_ids, source=source) if len(token_ids) else Skipped(source=source, reason="empty")


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


def open_mds(stream: str, source: MdsSource, root: str, digests: DigestCache) -> MdsDocuments:
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
    return MdsDocuments(source, folder, InputFiles(stream, found, digests, lambda path: path.stat().st_size))
