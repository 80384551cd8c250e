"""Attention masks of packed rows: a token sees those before it in its own document, within its layer's window, and no others.

Position ids alone keep documents apart only by what the library guesses from them, so masks are made from the segments. They
hold L x L elements a row: booleans for ``sdpa``, 0 and -inf for ``eager``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from outgrow.trainers.models.families import ALL_LAYERS, attention_implementation, layer_windows


def attention_inputs(config: PretrainedConfig, segments: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of the model's forward for packed rows: mask or masks, position ids, and no cache.

    segments    int [n, L], number of the document within its row; -1 for padding, which counts as one more document, so that a
                padding token always sees itself and no row of the mask is empty (an empty one gives NaN)
    positions   int64 [n, L]
    """
    masks: dict[str, Any] = {
        kind: _as_implementation_takes_it(visible(segments, window), attention_implementation(config))
        for kind, window in layer_windows(config).items()
    }
    return {
        "attention_mask": masks.get(ALL_LAYERS, masks),
        "position_ids": positions,
        "use_cache": False,
    }


def visible(segments: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [n, 1, L, L]: whether query i (third axis) sees key j (fourth): j <= i, same segment, and i - j < ``window``."""
    index = torch.arange(segments.shape[1], device=segments.device)
    distance = index[:, None] - index[None, :]
    in_reach = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (in_reach & (segments[:, :, None] == segments[:, None, :]))[:, None]


def _as_implementation_takes_it(mask: torch.Tensor, implementation: str) -> torch.Tensor:
    if implementation == "sdpa":
        return mask
    # -inf rather than the smallest float of one dtype: a cast to bfloat16 or float64 leaves 0 and -inf what they are.
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
