"""What attention is told of packed rows: a token sees those before it in its own document, within its layer's window.

Position ids alone keep documents apart only by what the library guesses from them, so masks are made from the segments. They
hold L x L elements a row for ``sdpa`` and ``eager``; for the others some squares, or the ends of documents.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from outgrow.trainers.models.attention import FLASH, FLEX, SDPA, VARLEN
from outgrow.trainers.models.block_masks import block_mask
from outgrow.trainers.models.custom import is_custom
from outgrow.trainers.models.families import ALL_LAYERS, attention_implementation, layer_windows
from outgrow.trainers.models.on_device import moved

_FEWEST_ENDS = 8
"""The number of documents is rounded up to a multiple of this, and of an eighth of the next power of two, so that few come up.
Flash attention's backward pass holds 128 rows for each, even of no length."""
_SHORTEST = 128
"""The length of the longest document is rounded up to a power of two from here on, so that few values come up."""


def attention_inputs(
    config: PretrainedConfig, segments: torch.Tensor, positions: torch.Tensor, device: torch.device | None = None
) -> dict[str, Any]:
    """Keyword arguments of the model's forward for packed rows: mask or masks, position ids, and no cache.

    segments    int [n, L], number of the document within its row; -1 for padding, which counts as one more document, so that a
                padding token always sees itself and no row of the mask is empty (an empty one gives NaN). Where they lie on the
                CPU, what they say of the whole batch is read without waiting for a device
    positions   int64 [n, L]
    device      where the result is to be; None: where the segments are

    What is made depends on the attention that was set for ``config``. A custom model masks by itself: it is given the segments.
    """
    device = segments.device if device is None else device
    if is_custom(config):
        return {"segments": moved(segments, device), "position_ids": moved(positions, device)}
    chosen = config._attn_implementation or attention_implementation(config)
    inputs = {"position_ids": moved(positions, device), "use_cache": False}
    if chosen in (VARLEN, FLASH):
        ends, longest = document_ends(segments.cpu())
        ends = moved(ends, device)
        return inputs | {
            "attention_mask": None,
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    masks: dict[str, Any] = {kind: _mask(segments, window, chosen, device) for kind, window in layer_windows(config).items()}
    return inputs | {"attention_mask": masks.get(ALL_LAYERS, masks)}


def visible(segments: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [n, 1, L, L]: whether query i (third axis) sees key j (fourth): j <= i, same segment, and i - j < ``window``."""
    index = torch.arange(segments.shape[1], device=segments.device)
    distance = index[:, None] - index[None, :]
    in_reach = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (in_reach & (segments[:, :, None] == segments[:, None, :]))[:, None]


def one_document_a_row(segments: torch.Tensor) -> bool:
    """Whether each row begins with its only document: then no token that counts can see another document, or padding."""
    return bool(((segments[:, 1:] == segments[:, :-1]) | (segments[:, 1:] == -1)).all())


def document_ends(segments: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where the documents of all rows, one row behind the other, begin and end, int32 [documents + 1] from 0 to n L; and a
    length that none of them exceeds. Padding is one more document.

    The list is filled up with documents of no length. ``segments`` on the CPU.
    """
    rows, length = segments.shape
    starts = torch.ones(rows, length, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begins = starts.flatten().nonzero().squeeze(1)
    apart = max(_FEWEST_ENDS, (1 << (len(begins) - 1).bit_length()) // 8)
    documents = -(-len(begins) // apart) * apart
    ends = torch.full((documents + 1,), rows * length, dtype=torch.int32)
    ends[: len(begins)] = begins
    longest = int(ends.diff().max())
    return ends, min(length, max(_SHORTEST, 1 << (longest - 1).bit_length()))


def _mask(segments: torch.Tensor, window: int | None, chosen: str, device: torch.device) -> Any:
    """What ``chosen`` takes for a mask; None where it is causal and nothing more, which ``outgrow_sdpa`` understands."""
    if chosen == FLEX:
        return block_mask(segments.cpu(), window, device)
    if chosen == SDPA and segments.device.type == "cpu":
        reaches_back = window is None or window >= segments.shape[1]
        if reaches_back and one_document_a_row(segments):
            return None
    mask = visible(moved(segments, device), window)
    # -inf rather than the smallest float of one dtype: a cast to bfloat16 or float64 leaves 0 and -inf what they are.
    return torch.zeros(mask.shape, device=device).masked_fill_(~mask, -torch.inf) if chosen == "eager" else mask
