"""One rank reads or acts, and every rank learns what came of it: the answer, or the failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from outgrow.errors import OutgrowError

T = TypeVar("T")


def by_rank_0(rank: int, act: Callable[[], T]) -> T:
    """What ``act`` gave, which is called on rank 0 alone: equal on all ranks. A collective of the default group.

    An ``OutgrowError`` or ``OSError`` of it is raised on every rank, so that none waits for one that has failed. The
    answer goes through pickle.
    """
    told: list[tuple[T | None, Exception | None] | None] = [None]
    if rank == 0:
        try:
            told = [(act(), None)]
        except (OutgrowError, OSError) as error:
            told = [(None, error)]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    assert told[0] is not None, "rank 0 takes part"
    answer, failure = told[0]
    if failure is not None:
        raise failure
    return answer  # type: ignore[return-value]  # there is an answer where there is no failure
