"""A window of steps that is looked at closely: a trace of what ran when, and a page of the device's allocations."""

from __future__ import annotations

import torch

from outgrow.recipes.schema.training import Profile
from outgrow.storage import Storage


class ProfileWindow:
    def __init__(
        self, profile: Profile, rank: int, storage: Storage, run_folder: str, device: torch.device, first_step: int
    ) -> None: ...

    def step(self, step: int) -> None: ...

    def close(self) -> None: ...
