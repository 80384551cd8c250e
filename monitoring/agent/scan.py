"""The runs of a node as their records show them now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from outgrow.monitoring.recording.attempt import AttemptFacts

RunState: TypeAlias = Literal["starting", "running", "stalled", "lost", "restarting", "finished", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class RankView:
    """One rank of the newest start of a run on this node; ``record`` are its slots."""

    rank: int
    record: Mapping[str, float]
    alive: bool


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The newest start of a run on this node. ``state`` is judged from the ranks of this node alone."""

    folder: Path
    facts: AttemptFacts
    ranks: Mapping[int, RankView]
    state: RunState

    @property
    def tells_the_run(self) -> bool:
        """Whether this node has rank 0, which speaks for the whole run."""
        return 0 in self.facts.local_ranks
