"""Notices the first step whose gradient is not finite, without waiting for the device."""

from __future__ import annotations

import torch


class FiniteWatch:
    """Looks at the gradient norm of every step, on the device; it is equal on all ranks, and so is the verdict.

    A NaN or infinite gradient may spoil parameters that the losses of the next steps do not touch (the embedding of a
    rare token), so the losses that happen to be read are not enough to call the weights sound.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, step: int, grad_norm: torch.Tensor) -> None:
        """Take note of finished step number ``step``."""
        bad_now = ~grad_norm.isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(bad_now, step, self._first_bad)

    def first_bad(self) -> int | None:
        """The first step seen to be bad; waits for the device."""
        step = int(self._first_bad.item())
        return step if step >= 0 else None
