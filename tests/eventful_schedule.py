"""Schedules of a recipe's own that make something happen."""

from __future__ import annotations

import time


def eventful(*, step: int, steps: int, seconds: float, slow_rank: int = -1, slow_s: float = 0.0, spike: int = -1) -> float:
    """Takes its time; longer on ``slow_rank``; and from step ``spike`` on the learning rate is ruinous."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    time.sleep(slow_s if rank == slow_rank else seconds)
    if spike >= 0 and step >= spike:
        return 1e3 if step < spike + 20 else 1e30
    return 1.0
