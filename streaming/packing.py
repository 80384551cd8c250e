"""Rows of the index turned into arrays: token ids, targets, weights, segments, positions and pairs. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from outgrow.contracts import IGNORE_INDEX
from outgrow.streaming.row_windows import Span
from outgrow.streaming.rows import StreamRows


class DocumentSource(Protocol):
    """Documents by number; see ``documents.Documents``. Spans are asked of streams of preference pairs alone."""

    def tokens(self, document: int) -> npt.NDArray[Any]: ...
    def weights(self, document: int) -> npt.NDArray[np.float32] | None: ...
    def spans(self, document: int) -> npt.NDArray[np.int32] | None: ...


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The arrays of ``contracts.Batch``, field by field with the same shapes and types."""

    token_ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    segments: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int32]
    row_ids: npt.NDArray[np.int64]


class Part(NamedTuple):
    """What becomes one segment: tokens ``start`` to ``stop`` of a document, none of which predicts a token from ``end`` on.

    ``pair`` is 0 for the chosen and 1 for the rejected answer of a preference pair, -1 for any other document.
    """

    start: int
    stop: int
    end: int
    pair: int


def parts(span: Span, tokens: int, pair: npt.NDArray[np.int32] | None) -> Iterator[Part]:
    """The segments of a span of a document of ``tokens`` tokens: one, or the two answers where ``pair`` gives their spans."""
    if pair is None:
        yield Part(span.start, span.start + span.length, tokens, -1)
    else:
        for number, (start, stop) in enumerate(pair.tolist()):
            yield Part(start, stop, stop, number)


def empty_rows(num_rows: int, sequence_length: int, fill_token: int) -> PackedRows:
    """``num_rows`` rows of padding: segment and pair -1, no target, positions counting on from 0, row id -1."""
    shape = (num_rows, sequence_length)
    return PackedRows(
        token_ids=np.full(shape, fill_token, np.int64),
        targets=np.full(shape, IGNORE_INDEX, np.int64),
        weights=np.zeros(shape, np.float32),
        segments=np.full(shape, -1, np.int32),
        positions=np.tile(np.arange(sequence_length, dtype=np.int64), (num_rows, 1)),
        pairs=np.full(shape, -1, np.int32),
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
    with a document that an earlier row began: the model does not see that part either. The answers of a preference pair are two
    segments; no target crosses from one to the other. A row that was given up becomes an ``idle_row`` under its own id.
    """
    packed.row_ids[place] = row_id
    token_ids, targets, weights = packed.token_ids[place], packed.targets[place], packed.weights[place]
    segments, positions, pairs = packed.segments[place], packed.positions[place], packed.pairs[place]
    ramp = np.arange(stream.sequence_length)
    at = segment = pair = 0
    for span in stream.spans(row):
        tokens, own_weights = documents.tokens(span.document), documents.weights(span.document)
        answers = documents.spans(span.document) if stream.pairs else None
        for start, stop, end, answer in parts(span, len(tokens), answers):
            own = slice(at, at + stop - start)
            predicted = slice(at, at + min(stop + 1, end) - (start + 1))
            token_ids[own] = tokens[start:stop]
            targets[predicted] = tokens[start + 1 : min(stop + 1, end)]
            weights[predicted] = 1 if own_weights is None else own_weights[start + 1 : min(stop + 1, end)]
            segments[own] = segment
            positions[own] = ramp[: stop - start]
            if answer >= 0:
                pairs[own] = 2 * pair + answer
            at, segment = own.stop, segment + 1
        pair += answers is not None
    positions[at:] = ramp[: stream.sequence_length - at]
    if not at:
        segments[:] = 0


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
