"""The documents of a token store by number: token ids, origin and loss weights, straight from checked shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.shards import SHARDS


class Documents:
    """One split of one stream. ``digests`` is ``files`` of the store's manifest; ``open_shards`` shards stay mapped."""

    def __init__(self, store: Path, name: str, split: str, digests: Mapping[str, str], *, open_shards: int) -> None:
        below = f"streams/{name}/{split}"
        self._folder = MdsFolder(store / below, digests[f"{below}/{SHARDS}"], open_shards=open_shards)

    def __len__(self) -> int:
        return len(self._folder)

    def tokens(self, document: int) -> npt.NDArray[Any]:
        """Token ids, uint16 or uint32 [n]; a read-only view into the shard."""
        tokens: npt.NDArray[Any] = self._folder.column(document, "tokens")
        return tokens

    def source(self, document: int) -> str:
        """Where the document came from."""
        source: str = self._folder.column(document, "source")
        return source

    def weights(self, document: int) -> npt.NDArray[np.float32] | None:
        """Loss weight of each token as a target, float32 [n]; None where all are 1."""
        data: bytes = self._folder.column(document, "weights")
        return np.frombuffer(data, np.float32) if data else None

    def spans(self, document: int) -> npt.NDArray[np.int32] | None:
        """Start and stop of the chosen and of the rejected answer of a preference pair, each with its prompt, int32 [2, 2];
        None for any other document."""
        data: bytes = self._folder.column(document, "spans")
        return np.frombuffer(data, np.int32).reshape(2, 2) if data else None
