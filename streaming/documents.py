"""The documents of a token store by number: token ids, origin and loss weights, straight from checked shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outgrow.errors import IntegrityError, ShardError
from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.shards import SHARDS

_HEALINGS = 2
"""Times that a shard is fetched again for one document; a disk that damages every copy is not worked around."""


class Documents:
    """One split of one stream; ``digests`` is ``files`` of the store's manifest, and ``open_shards`` shards stay mapped.

    Of shards that are copied to this node before they are read, ``path_of`` gives the path by the name of the file, and
    ``heal`` has a copy that is damaged fetched again, by the shard's number; None: they lie in the store. Every method raises
    ``ShardError`` for a shard of the training split that is not whole, ``IntegrityError`` for one held out.
    """

    def __init__(
        self,
        store: Path,
        name: str,
        split: str,
        digests: Mapping[str, str],
        *,
        open_shards: int,
        path_of: Callable[[str], Path] | None = None,
        heal: Callable[[int], None] | None = None,
    ) -> None:
        below = f"streams/{name}/{split}"
        self._folder = MdsFolder(store / below, digests[f"{below}/{SHARDS}"], open_shards=open_shards, path_of=path_of)
        self._name = name
        self._split = split
        self._heal = heal

    def __len__(self) -> int:
        return len(self._folder)

    def tokens(self, document: int) -> npt.NDArray[Any]:
        """Token ids, uint16 or uint32 [n]; a read-only view into the shard."""
        tokens: npt.NDArray[Any] = self._column(document, "tokens")
        return tokens

    def source(self, document: int) -> str:
        """Where the document came from."""
        source: str = self._column(document, "source")
        return source

    def weights(self, document: int) -> npt.NDArray[np.float32] | None:
        """Loss weight of each token as a target, float32 [n]; None where all are 1."""
        data: bytes = self._column(document, "weights")
        return np.frombuffer(data, np.float32) if data else None

    def spans(self, document: int) -> npt.NDArray[np.int32] | None:
        """Start and stop of the chosen and of the rejected answer of a preference pair, each with its prompt, int32 [2, 2];
        None for any other document."""
        data: bytes = self._column(document, "spans")
        return np.frombuffer(data, np.int32).reshape(2, 2) if data else None

    def close_replaced(self) -> None:
        """Unmap the shards whose copies are gone, or were changed."""
        self._folder.close_replaced()

    def _column(self, document: int, name: str) -> Any:
        try:
            return self._folder.column(document, name)
        except IntegrityError as error:
            return self._healed_column(document, name, error)

    def _healed_column(self, document: int, name: str, error: IntegrityError) -> Any:
        """The column, once the copy of its shard was fetched again; ``error`` is what was wrong with it."""
        shard = self._folder.shard_of(document)
        for _ in range(_HEALINGS if self._heal is not None else 0):
            assert self._heal is not None
            self._heal(shard)
            try:
                return self._folder.column(document, name)
            except IntegrityError as again:
                error = again
        if self._split != "train":
            raise error
        hint = "outgrow data verify tells what else is damaged"
        raise ShardError(error.message, stream=self._name, shard=shard, where=error.where, hint=hint)
