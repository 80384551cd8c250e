"""Going back to an earlier checkpoint of the same run for good, so that a kill at any point changes nothing of what is learned.

``<run folder>/roll-backs/<number>.json`` says that the run went back, from which step to which, and how it goes on from there.
It is written before anything else is done, whole or not at all: from then on the checkpoints of the steps in between are none
of the run's any more, and every start removes those that are still there. A start that finds no such file repeats the steps,
and decides the same.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

from outgrow.contracts import Record
from outgrow.errors import TrainingError
from outgrow.storage import Storage
from outgrow.trainers.by_rank_0 import by_rank_0
from outgrow.trainers.checkpoint.catalog import Saved, survey
from outgrow.trainers.checkpoint.commit import discard
from outgrow.trainers.checkpoint.retention import best_of
from outgrow.trainers.guard import GuardState

FOLDER = "roll-backs"


@dataclass(frozen=True, kw_only=True)
class RollBack(Record):
    """One time that a run went back: after ``from_step`` finished steps, to the checkpoint of ``to_step``.

    ``rate`` is what the schedule's learning rate is multiplied by from there on; ``lowest`` is the guard's value at
    ``lowest_step``; ``time`` is Unix seconds.
    """

    number: int
    from_step: int
    to_step: int
    rate: float
    lowest: float
    lowest_step: int
    why: str
    time: float

    @classmethod
    def wanted(cls, state: GuardState, step: int, factor: float, why: str) -> Self:
        """That of a guard in ``state`` after ``step`` steps, which lowers the learning rate by ``factor``; where to is open."""
        assert state.lowest is not None, "a rise is above something"
        return cls(
            number=state.roll_backs + 1,
            from_step=step,
            to_step=0,
            rate=state.rate * factor,
            lowest=state.lowest,
            lowest_step=state.lowest_step,
            why=why,
            time=time.time(),
        )

    @property
    def state(self) -> GuardState:
        """What the guard goes on from."""
        return GuardState(lowest=self.lowest, lowest_step=self.lowest_step, roll_backs=self.number, rate=self.rate)


def settle(storage: Storage, run_folder: str, rank: int) -> tuple[RollBack, ...]:
    """The times that the run went back, in order and equal on all ranks; what they left behind is removed. A collective."""
    return by_rank_0(rank, lambda: _clear_away(storage, run_folder))


def go_back(
    storage: Storage, run_folder: str, rank: int, wanted: RollBack, metric: str, distrusted: Collection[str]
) -> RollBack | None:
    """Leave all that came after the checkpoint with the lowest ``metric``; None where there is none to go back to.

    ``wanted`` says why and with what, and not yet where to; ``distrusted`` are checkpoints that did not load. A collective,
    with no save in flight. Raises ``TrainingError`` on all ranks where it cannot be written down.
    """
    try:
        return by_rank_0(rank, lambda: _write(storage, run_folder, wanted, metric, distrusted))
    except OSError as error:
        raise TrainingError(
            f"the run cannot go back from step {wanted.from_step}: {error}",
            where=run_folder,
            hint="make room or mend the storage; the same command then does it",
        ) from error


def read(storage: Storage, run_folder: str) -> tuple[RollBack, ...]:
    """All times that the run went back, in order. Raises ``IntegrityError`` for a file that does not say it."""
    found = storage.read_records(f"{run_folder}/{FOLDER}", RollBack, hint="put it back from a copy")
    return tuple(sorted(found, key=lambda back: back.number))


def belongs(saved: Saved, backs: Sequence[RollBack]) -> bool:
    """Whether a checkpoint is one of the run as it went on, and not of steps that it went back from since."""
    later = backs[GuardState.of(saved.manifest.metrics).roll_backs :]
    return all(saved.ref.step <= back.to_step for back in later)


def state_after(saved: GuardState, backs: Sequence[RollBack]) -> GuardState:
    """The guard's state at a checkpoint that has ``saved``: that of the last time the run went back, where it came later."""
    return backs[-1].state if len(backs) > saved.roll_backs else saved


def _write(storage: Storage, run_folder: str, wanted: RollBack, metric: str, distrusted: Collection[str]) -> RollBack | None:
    """``wanted`` with where it goes to, written and acted on; None where no checkpoint has the metric."""
    found = survey(storage, run_folder).saved
    target = best_of([saved for saved in found if saved.ref.folder not in distrusted], metric)
    if target is None:
        return None
    back = replace(wanted, to_step=target.ref.step)
    storage.write_json(f"{run_folder}/{FOLDER}/{back.number:03d}.json", back.to_dict())
    _clear_away(storage, run_folder)
    return back


def _clear_away(storage: Storage, run_folder: str) -> tuple[RollBack, ...]:
    """Remove the checkpoints that the run went back from."""
    backs = read(storage, run_folder)
    if backs:
        for saved in survey(storage, run_folder).saved:
            if not belongs(saved, backs):
                discard(storage, saved.ref.folder)
    return backs
