"""Whether a run whose validation loss rises goes on, ends or goes back: values in, a decision out.

All that the next decision depends on is in ``GuardState``, which every checkpoint keeps: so a run that was killed decides what
it would have decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from pydantic import TypeAdapter, ValidationError

from outgrow.recipes.schema.training import TOTAL, Guard, NoGuard, RollBackOnRise, StopOnRise
from outgrow.trainers.checkpoint.retention import loss_key
from outgrow.trainers.validation import ValidationLoss

Action: TypeAlias = Literal["go_on", "stop", "roll_back"]

_PREFIX = "guard/"


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """What the validations so far have come to.

    ``lowest`` is the lowest value, nats a token, after ``lowest_step`` steps; None before the first. ``rises`` counts the
    validations in a row that showed a rise, ``roll_backs`` how often the run went back; the schedule's learning rate is
    multiplied by ``rate``. ``ended``: the run ended here for the rise.
    """

    lowest: float | None = None
    lowest_step: int = 0
    rises: int = 0
    roll_backs: int = 0
    rate: float = 1.0
    ended: bool = False

    @classmethod
    def of(cls, metrics: Mapping[str, float | None]) -> Self:
        """From the metrics of a checkpoint; as at the start where they say nothing of it."""
        saved = {name.removeprefix(_PREFIX): value for name, value in metrics.items() if name.startswith(_PREFIX)}
        return cls(
            lowest=saved.get("lowest"),
            lowest_step=int(saved.get("lowest_step") or 0),
            rises=int(saved.get("rises") or 0),
            roll_backs=int(saved.get("roll_backs") or 0),
            rate=saved.get("rate") or 1.0,
            ended=bool(saved.get("ended")),
        )

    def metrics(self) -> dict[str, float | None]:
        """What a checkpoint keeps; nothing as long as nothing was guarded."""
        if self == GuardState():
            return {}
        return {f"{_PREFIX}{name}": None if value is None else float(value) for name, value in vars(self).items()}


def guard_in(recipe: Mapping[str, Any]) -> Guard:
    """The guard of a recipe as a checkpoint keeps it; ``NoGuard`` where it is from before there were any, or of other rules."""
    given = (recipe.get("validation") or {}).get("on_rise") or {"kind": "none"}
    try:
        guard: Guard = TypeAdapter(Guard).validate_python(given)
    except ValidationError:
        return NoGuard()
    return guard


def taken_over(state: GuardState, before: Guard, now: Guard) -> GuardState:
    """The state that a start with the guard ``now`` goes on with, where a checkpoint was made under ``before``.

    Another guard decides anew: what was counted up to a limit is forgotten, and what was measured of another metric too. The
    learning rate stays as low as it was made.
    """
    if now == before:
        return state
    kept = replace(state, rises=0, ended=False)
    if isinstance(now, NoGuard) or isinstance(before, NoGuard) or now.metric != before.metric:
        return replace(kept, lowest=None, lowest_step=0)
    return kept


def judge(guard: Guard, state: GuardState, step: int, loss: float | None) -> tuple[GuardState, Action]:
    """What to do after the validation of ``step`` finished steps, and the state from there on.

    ``loss`` is the value of the guard's metric, None where nothing was measured. Equal arguments, as all ranks have them, give
    equal answers.
    """
    if isinstance(guard, NoGuard) or loss is None:
        return state, "go_on"
    if state.lowest is None or loss < state.lowest:
        return replace(state, lowest=loss, lowest_step=step, rises=0), "go_on"
    state = replace(state, rises=state.rises + 1 if loss >= state.lowest + guard.rise else 0)
    if state.rises < guard.patience:
        return state, "go_on"
    if isinstance(guard, RollBackOnRise) and state.roll_backs < guard.times:
        return state, "roll_back"
    return replace(state, ended=True), "stop"


def watched(guard: Guard, found: ValidationLoss | None) -> float | None:
    """The value of the guard's metric; None where it watches nothing, or that was not measured."""
    return None if isinstance(guard, NoGuard) or found is None else found.of(guard.metric)


def why_ended(metrics: Mapping[str, float | None], step: int, recipe: Mapping[str, Any], now: Guard) -> str:
    """Why a run ended with the checkpoint of ``step`` that has these ``metrics``, before its last step.

    Empty where it did not, or did so by another guard than that of ``now``: then it may go on. ``recipe`` is the checkpoint's.
    """
    state, guard = GuardState.of(metrics), guard_in(recipe)
    loss = None if isinstance(guard, NoGuard) else metrics.get(loss_key(guard.metric))
    if isinstance(guard, NoGuard) or loss is None or not state.ended or guard != now:
        return ""
    said = why(guard, state, step, loss)
    if isinstance(guard, StopOnRise):
        return said
    if state.roll_backs >= guard.times:
        return f"{said}, and the run has gone back {state.roll_backs} time(s) already"
    return f"{said}, and there is no checkpoint to go back to"


def why(guard: StopOnRise | RollBackOnRise, state: GuardState, step: int, loss: float) -> str:
    """The rise that ``judge`` has acted on, for a person; ``state`` is what it gave."""
    assert state.lowest is not None, "a rise is above something"
    what = "the validation loss" if guard.metric == TOTAL else f"the validation loss of '{guard.metric}'"
    times = f" in {state.rises} validations in a row" if state.rises > 1 else ""
    return (
        f"{what} has risen to {loss:.4f} at step {step}, {loss - state.lowest:.4f} above its lowest, {state.lowest:.4f} at "
        f"step {state.lowest_step}; validation.on_rise allows less than {guard.rise:g}{times}"
    )
