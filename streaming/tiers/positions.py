"""How far the readers of a node have come in the steps of a run. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from outgrow.streaming.tiers.gate import Reads


@dataclass
class _Rank:
    seat: int
    positions: list[int]


class Positions:
    """The next step of every reader of every rank. A rank has a number, and at any time one ``seat``."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Rank] = {}
        self._seen: set[int] = set()

    @property
    def num_seen(self) -> int:
        """Ranks that have ever joined."""
        return len(self._seen)

    @property
    def frontier(self) -> int | None:
        """The lowest step that some reader has not left; None where there is no reader."""
        return min((min(rank.positions) for rank in self._ranks.values()), default=None)

    def join(self, rank: int, seat: int, reads: Reads) -> None:
        """A rank takes a seat, and gives up the one that it had."""
        self._ranks[rank] = _Rank(seat, list(reads.positions))
        self._seen.add(rank)

    def leave(self, rank: int, seat: int) -> None:
        """The holder of a seat reads no more."""
        if rank in self._ranks and self._ranks[rank].seat == seat:
            del self._ranks[rank]

    def reach(self, rank: int, reader: int, step: int) -> None:
        """A reader has left every step of its own before ``step``."""
        if rank in self._ranks:
            own = self._ranks[rank].positions
            own[reader] = max(own[reader], step)

    def leave_step(self, rank: int, reader: int, step: int) -> None:
        """A reader has left ``step``: its next one is as many further on as the rank has readers."""
        if rank in self._ranks:
            self.reach(rank, reader, step + len(self._ranks[rank].positions))
