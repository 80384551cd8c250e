"""What state a run is in, judged from the ranks of one node. Pure: records and facts in, a word out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from outgrow.monitoring.recording.attempt import AttemptFacts
from outgrow.monitoring.recording.slots import STATES, State
from outgrow.monitoring.recording.stall import BETWEEN_STEPS_S

if TYPE_CHECKING:
    from outgrow.monitoring.agent.scan import RankView, RunState

ENDED: tuple[State, ...] = ("finished", "failed", "interrupted")
"""After these no rank comes back in the same start."""
RESTART_S = 600.0
"""How long a run may be without a rank once these have asked to be started again."""

_WORST_FIRST: tuple[State, ...] = ("failed", "interrupted", "restarting", "finished")


def said(record: Mapping[str, float]) -> State:
    """What a rank has said of itself last."""
    number = record["state"]
    return STATES[int(number)] if 0 <= number < len(STATES) else "starting"  # not so for NaN either


def open_s(rank: RankView) -> float:
    """Seconds for which what the rank does has been open; NaN once it has said its last word."""
    return rank.read_at - rank.record["open_since"]


def is_stuck(rank: RankView) -> bool:
    """Whether what a living rank does has been open for too long."""
    threshold_s = rank.record["stall_threshold"]
    limit_s = threshold_s if rank.record["stepping"] == 1 else max(threshold_s, BETWEEN_STEPS_S)
    return open_s(rank) > limit_s


def judge(facts: AttemptFacts, ranks: Mapping[int, RankView], now: float) -> RunState:
    """The state of a run at the Unix time ``now``, by those of ``facts.local_ranks`` that have a record.

    Rank 0 has the word where it is here: what it says at its end holds whatever became of the others. Before that, a rank that
    is gone without a word makes the run ``lost``, and one that is stuck makes it ``stalled``. A rank without a record counts
    for neither: it has not come so far yet, or found no room to write one.
    """
    words = {rank: said(view.record) for rank, view in ranks.items()}
    word = _word_of_all(words)
    if word in ENDED:
        return word
    if word == "restarting":
        last = max(view.record["touched"] for view in ranks.values())
        return "lost" if now - last > RESTART_S else "restarting"
    under_way = [view for rank, view in ranks.items() if words[rank] not in _WORST_FIRST]
    if any(not view.alive for view in under_way):
        return "lost"
    return "stalled" if any(map(is_stuck, under_way)) else word


def _word_of_all(words: Mapping[int, State]) -> State:
    """That of rank 0; without it that of the lowest rank under way, or the worst that those at their end have said."""
    if 0 in words:
        return words[0]
    going = [words[rank] for rank in sorted(words) if words[rank] not in _WORST_FIRST]
    if going:
        return going[0]
    return next((word for word in _WORST_FIRST if word in words.values()), "starting")
