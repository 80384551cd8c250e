"""Which trackers a recipe asks for, what they need, and how each is opened in the folder of a run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from outgrow.contracts import JsonDict
from outgrow.errors import PlanError, UserError
from outgrow.monitoring.trackers.mirror import Mirrored, bring
from outgrow.monitoring.trackers.tracking import OpenTracker, Tracker
from outgrow.recipes.schema import Recipe
from outgrow.storage import Storage

_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What is to be installed; each is imported under the name of the tracker."""
_ENVIRONMENT = {
    # MLflow refuses its own file store unless it is asked for by name, and would send how it is used.
    "mlflow": {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"},
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
}


def tracker_environment(names: Sequence[str]) -> dict[str, str]:
    """The variables that trackers need; set in rank 0's process before one is opened, and shown by ``outgrow plan``."""
    return {variable: value for name in names for variable, value in _ENVIRONMENT.get(name, {}).items()}


def known_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """``names`` as they are, each once. Raises ``UserError`` for one that is no tracker."""
    asked = tuple(dict.fromkeys(names))
    for name in asked:
        if name not in _PACKAGES:
            near = difflib.get_close_matches(name, _PACKAGES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(_PACKAGES)}"
            raise UserError(f"no tracker '{name}'", hint=hint)
    _refuse_missing(asked)
    return asked


def check_trackers(recipe: Recipe) -> None:
    """Nothing where every tracker of the recipe can be imported here. Raises ``PlanError`` naming those that cannot."""
    try:
        _refuse_missing(recipe.logging.trackers)
    except PlanError as error:
        error.where = "logging.trackers"
        raise


def _refuse_missing(names: Sequence[str]) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        packages, are = " and ".join(_PACKAGES[name] for name in missing), "are" if len(missing) > 1 else "is"
        others = ",".join(name for name in names if name not in missing)
        raise PlanError(
            f"{' and '.join(missing)} cannot be told of the run: {packages} {are} not installed",
            hint=f"pip install 'outgrow[{','.join(missing)}]', or leave out: logging.trackers=[{others}]",
        )


def open_trackers(
    names: Sequence[str], recipe: JsonDict, storage: Storage, run_folder: str, node: Path
) -> dict[str, OpenTracker]:
    """How to open each tracker, by name: in ``<run folder>/<name>``.

    On a bucket it writes into ``<node>/trackers/<run>/<name>`` and is uploaded at the end; a run that was killed before goes on
    with what lies there, or in the bucket.
    """
    return {name: partial(_open, name, recipe, storage, run_folder, node) for name in names}


def _open(name: str, recipe: JsonDict, storage: Storage, run_folder: str, node: Path) -> Tracker:
    os.environ.update(tracker_environment([name]))
    run, key = PurePosixPath(run_folder).name, f"{run_folder}/{name}"
    if storage.is_local:
        return _tracker(name, Path(storage.path(key)), run, recipe)
    folder = node / "trackers" / run / name
    if not folder.exists():
        bring(storage, key, folder)
    return Mirrored(_tracker(name, folder, run, recipe), storage, key, folder)


def _tracker(name: str, folder: Path, run: str, recipe: JsonDict) -> Tracker:
    if name == "tensorboard":
        from outgrow.monitoring.trackers.tensorboard import TensorBoard

        return TensorBoard(folder, recipe)
    if name == "mlflow":
        from outgrow.monitoring.trackers.mlflow import MLflow

        return MLflow(folder, run, recipe)
    from outgrow.monitoring.trackers.wandb import WeightsAndBiases

    return WeightsAndBiases(folder, run, recipe)
