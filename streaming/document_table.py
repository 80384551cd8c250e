"""What a store knows of its documents without their tokens: one table a part of the build, beside the shards.

``streams/<name>/<split>/documents/00000.safetensors`` and so on; their rows, one after the other, are the samples of the MDS
folder in order. The row index, the choice of documents and the report read these tables, a part at a time, and no token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save_file

from outgrow.errors import IntegrityError
from outgrow.storage import digest

FOLDER = "documents"
SIGNATURE_SIZE = 128
"""Numbers of a MinHash signature."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DocumentTable:
    """The documents of one part, N of them.

    lengths        int64 [N]       tokens
    shard          int32 [N]       number of the document's shard in the MDS folder; never falls
    weight         float64 [N]     sum of the loss weights of its targets, that is of all tokens but the first (of a preference
                                   pair: but the first of either answer)
    uniform        bool [N]        whether every weight is 1
    chars          int64 [N]       characters of its text after cleaning; 0 for token ids
    content        uint64 [N, 2]   the first 16 bytes of the sha256 of its content after cleaning
    border_counts  int32 [N]       how many borders each has
    borders        int32 [sum]     tokens at which a new sentence or turn begins, ascending in each document, never 0
    language       uint8 [N, 2]    ISO 639-1 code in ASCII, or None where it was not asked for; zeros: not known
    signature      uint32 [N, 128] MinHash of its word 5-grams, or None where it was not asked for
    """

    lengths: npt.NDArray[np.int64]
    shard: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.bool_]
    chars: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint64]
    border_counts: npt.NDArray[np.int32]
    borders: npt.NDArray[np.int32]
    language: npt.NDArray[np.uint8] | None = None
    signature: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The columns that are there, by name."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def save(self, folder: Path, part: int) -> None:
        """Write it as table number ``part`` below an MDS folder; not yet durable."""
        path = folder / FOLDER / f"{part:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(column) for name, column in self.arrays.items()}, path)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(**load(data))


def read_tables(store: Path, name: str, split: str, digests: Mapping[str, str]) -> Iterator[DocumentTable]:
    """The tables of one split of one stream, part after part; ``digests`` is ``files`` of the store's manifest.

    Raises ``IntegrityError`` where one is missing or differs.
    """
    below = f"streams/{name}/{split}/{FOLDER}/"
    for key in sorted(key for key in digests if key.startswith(below)):
        path = store / key
        if not path.is_file():
            raise IntegrityError("the file is missing", where=str(path))
        data = path.read_bytes()
        if digest(data) != digests[key]:
            raise IntegrityError("the bytes differ from their digest", where=str(path))
        yield DocumentTable.parse(data)
