"""What a rank was doing when a step stalled: the stacks of all its threads, and the collectives that it waits in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class StallWatch:
    def __init__(self, folder: Path, rank: int, threshold: Callable[[], float], open_s: Callable[[], float]) -> None: ...

    def close(self) -> None: ...
