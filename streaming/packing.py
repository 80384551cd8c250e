"""Rows of the index turned into arrays: token ids, targets, weights, segments and positions. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from outgrow.contracts import IGNORE_INDEX
from outgrow.streaming.rows import StreamRows


class DocumentSource(Protocol):
    """Documents by number; see ``documents.Documents``."""

    def tokens(self, document: int) -> npt.NDArray[Any]: ...
    def weights(self, document: int) -> npt.NDArray[np.float32] | None: ...


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The arrays of ``contracts.Batch``, field by field with the same shapes and types."""

    token_ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    segments: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.int64]


def empty_rows(num_rows: int, sequence_length: int, fill_token: int) -> PackedRows:
    """``num_rows`` rows of padding: segment -1, no target, positions counting on from 0, row id -1."""
    shape = (num_rows, sequence_length)
    return PackedRows(
        token_ids=np.full(shape, fill_token, np.int64),
        targets=np.full(shape, IGNORE_INDEX, np.int64),
        weights=np.zeros(shape, np.float32),
        segments=np.full(shape, -1, np.int32),
        positions=np.tile(np.arange(sequence_length, dtype=np.int64), (num_rows, 1)),
        row_ids=np.full(num_rows, -1, np.int64),
    )


def idle_row(sequence_length: int, fill_token: int) -> PackedRows:
    """One row that weighs nothing, for a rank that has no row: a document of ``fill_token`` alone, so a forward pass is
    finite."""
    row = empty_rows(1, sequence_length, fill_token)
    row.segments[:] = 0
    return row


def pack_row(packed: PackedRows, place: int, row_id: int, stream: StreamRows, row: int, documents: DocumentSource) -> None:
    """Fill row ``place`` of ``packed`` with row ``row`` of a stream.

    Segments number the documents within the row from 0. Positions start at 0 in each segment, so also where a row goes on
    with a document that an earlier row began: the model does not see that part either.
    """
    packed.row_ids[place] = row_id
    token_ids, targets, weights = packed.token_ids[place], packed.targets[place], packed.weights[place]
    segments, positions = packed.segments[place], packed.positions[place]
    ramp = np.arange(stream.sequence_length)
    at = 0
    for segment, (document, start, length) in enumerate(stream.spans(row)):
        tokens = documents.tokens(document)
        stop = start + length
        predicted = min(stop + 1, len(tokens)) - (start + 1)
        token_ids[at : at + length] = tokens[start:stop]
        targets[at : at + predicted] = tokens[start + 1 : start + 1 + predicted]
        own_weights = documents.weights(document)
        weights[at : at + predicted] = 1 if own_weights is None else own_weights[start + 1 : start + 1 + predicted]
        segments[at : at + length] = segment
        positions[at : at + length] = ramp[:length]
        at += length
    positions[at:] = ramp[: stream.sequence_length - at]


def pack(
    row_ids: Sequence[int],
    streams: Sequence[StreamRows],
    first_rows: npt.NDArray[np.int64],
    sources: Sequence[DocumentSource],
    *,
    fill_token: int,
) -> PackedRows:
    """The rows ``row_ids`` (numbered over ``streams``), in that order; one idle row where there are none."""
    sequence_length = streams[0].sequence_length
    if not row_ids:
        return idle_row(sequence_length, fill_token)
    packed = empty_rows(len(row_ids), sequence_length, fill_token)
    owners = np.searchsorted(first_rows, row_ids, "right") - 1
    for place, (row_id, owner) in enumerate(zip(row_ids, owners.tolist(), strict=True)):
        pack_row(packed, place, row_id, streams[owner], row_id - int(first_rows[owner]), sources[owner])
    return packed
