"""Weights & Biases, offline: files that ``wandb sync`` sends, if the user wants that.

Each start of a run adds an offline folder of the same id. A step that was trained again stands there twice, each time at its
own step, in the order in which it was trained; ``outgrow runs track`` makes one folder in which it stands once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outgrow.contracts import JsonDict, StepRecord
from outgrow.monitoring.trackers.points import points_of, samples_of

_PROJECT = "outgrow"
_STEP = "step"


class WeightsAndBiases:
    """One offline run more in ``folder``, which is named ``wandb``, with the id ``run``."""

    def __init__(self, folder: Path, run: str, recipe: JsonDict) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            mode="offline",
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        # Its own folder `wandb` is made below the one that it is given.
        self._run: Any = wandb.init(
            project=_PROJECT, name=run, id=run, dir=str(folder.parent), config=dict(recipe), settings=settings
        )
        # Not its own count of calls, which can never go back: a restarted run does.
        self._run.define_metric("*", step_metric=_STEP)

    def record(self, record: StepRecord) -> None:
        values: dict[str, Any] = dict(points_of(record))
        if samples := samples_of(record):
            values["samples"] = samples
        if values:
            self._run.log({_STEP: record.step} | values)

    def close(self) -> None:
        import wandb

        try:
            self._run.finish()
        finally:
            # An offline run's `finish` only asks wandb's own process to close the file, whose last 32 kB are in that process
            # still. This waits for it, and for any other run that this process has begun.
            wandb.teardown()
