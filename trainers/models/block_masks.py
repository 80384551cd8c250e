"""Block masks of packed rows for flex_attention: which squares of the L x L scores are computed, and which of them whole.

They are worked out from the documents' borders alone, some L/128 x L/128 numbers a row on the CPU, where
``create_block_mask`` would look at every one of the L x L pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from outgrow.trainers.models.on_device import moved

BLOCK = 128
"""Queries and keys on a side of a square."""


def block_mask(segments: torch.Tensor, window: int | None, device: torch.device) -> BlockMask:
    """The mask of ``masks.visible`` as squares, on ``device``. ``segments`` int [n, L] on the CPU."""
    length = segments.shape[1]
    runs = document_numbers(segments)
    some, all_of_it = squares(runs, window)
    on_device = moved(runs, device)

    def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
        sees = (query >= key) & (on_device[row, query] == on_device[row, key])
        return sees if window is None else sees & (query - key < window)

    counts, places, whole_counts, whole_places = (moved(table, device) for table in (*_as_lists(some), *_as_lists(all_of_it)))
    return BlockMask.from_kv_blocks(
        counts, places, whole_counts, whole_places, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def document_numbers(segments: torch.Tensor) -> torch.Tensor:
    """int32 [n, L]: documents of a row, padding being one more, numbered as they follow each other."""
    changes = segments.new_zeros(segments.shape, dtype=torch.int32)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return changes.cumsum(1, dtype=torch.int32)


def squares(runs: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bool [n, L/128, L/128] (queries, keys): where some query may see some key, and where every query sees every key.

    A square is in one of them or in none; at the end of a row that is no multiple of 128 it is never in the second.
    """
    length = runs.shape[1]
    count = -(-length // BLOCK)
    starts = torch.arange(count) * BLOCK
    first, last = runs[:, starts], runs[:, (starts + BLOCK - 1).clamp(max=length - 1)]
    query, key = torch.arange(count)[:, None], torch.arange(count)[None, :]
    # Documents follow each other: what a query can see is the end of its own document's part of an earlier square.
    touching = (key <= query) & (last[:, None, :] >= first[:, :, None])
    one_document = (first[:, None, :] == last[:, :, None]) & (key < query) & ((query + 1) * BLOCK <= length)
    if window is not None:
        nearest, farthest = (query - key - 1) * BLOCK + 1, (query - key + 1) * BLOCK - 1
        touching = touching & (nearest < window)
        one_document = one_document & (farthest < window)
    return touching & ~one_document, one_document


def _as_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many squares each row of squares has, int32 [n, 1, q], and which, int32 [n, 1, q, k], the chosen ones first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
