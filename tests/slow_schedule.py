"""A schedule of a recipe's own that takes its time."""

from __future__ import annotations

import time


def constant(*, step: int, steps: int, seconds: float) -> float:
    time.sleep(seconds)
    return 1.0
