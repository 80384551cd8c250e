"""Wall seconds by kind for a scrape: a rank's account with its open interval, and never less than was shown before.

A counter that falls looks to Prometheus as if it had begun anew, so that all of it counts once more. But what is shown of an
open interval can turn out to be another kind's: a rank that is killed in a checkpoint leaves its account as it was when the
checkpoint began, and its next start books all the time since then as ``init`` or ``idle``.
"""

from __future__ import annotations

from collections.abc import Mapping

from outgrow.monitoring.agent.run_state import open_s
from outgrow.monitoring.agent.scan import RankView
from outgrow.monitoring.recording.slots import WALL, Wall


def wall_seconds(rank: RankView) -> dict[Wall, float]:
    """Seconds since the first start of the run by kind, what is open now included where its kind is known by now.

    That of a step is not before it is done (it may be ``productive`` or ``recompute``), but what goes beyond the threshold is
    ``stalled``. The open interval of a rank that is gone is left out: nobody saw its end.
    """
    record = rank.record
    seconds: dict[Wall, float] = {kind: record[f"wall_s.{kind}"] for kind in WALL}
    number, open_for = record["open_kind"], open_s(rank)
    if not rank.alive or not 0 <= number < len(WALL) or not open_for > 0:  # not so for NaN either
        return seconds
    if record["stepping"] == 1:
        seconds["stalled"] += max(0.0, open_for - record["stall_threshold"])
    else:
        seconds[WALL[int(number)]] += open_for
    return seconds


class WallAccount:
    """Turns the seconds of each scrape into ones that never fall: what was shown too early is taken off where it turns up."""

    def __init__(self) -> None:
        self._shown: dict[Wall, float] = {}
        self._correction: dict[Wall, float] = dict.fromkeys(WALL, 0.0)
        self._ahead = 0.0  # the sum of the corrections: shown already, and not yet found under another kind

    def show(self, seconds: Mapping[Wall, float]) -> dict[Wall, float]:
        """``seconds`` by kind, corrected; their sum is theirs as soon as they have grown by what was shown too early."""
        found: dict[Wall, float] = {}
        for kind, value in seconds.items():
            found[kind] = value + self._correction[kind]
            missing = self._shown.get(kind, found[kind]) - found[kind]
            if missing > 0:
                self._correct(kind, missing, found)
        for kind in found:
            grown = found[kind] - self._shown.get(kind, found[kind])
            if self._ahead > 0 and grown > 0:
                self._correct(kind, -min(grown, self._ahead), found)
        # Rounding in the last place must not make one fall either.
        self._shown = {kind: max(value, self._shown.get(kind, value)) for kind, value in found.items()}
        return dict(self._shown)

    def _correct(self, kind: Wall, by: float, found: dict[Wall, float]) -> None:
        self._correction[kind] += by
        self._ahead += by
        found[kind] += by
