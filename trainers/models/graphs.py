"""How many graphs torch's compiler may make of one function."""

from __future__ import annotations

import torch

_MOST = 64
"""Shapes that come up (short steps, stages, validation), kinds of layers, with and without gradients. With torch's own limit of
8 the ninth would run uncompiled without a word in the run's records."""


def allow_graphs() -> None:
    """To be called before ``torch.compile``: a function may then have as many graphs as a run makes of it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST)
