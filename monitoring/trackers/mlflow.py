"""MLflow's file store in the run folder: one MLflow run for a run of ours, its recipe as parameters.

A step that is trained again after a restart is shown once, as it was trained last: MLflow itself can take nothing back, so
what it holds of later steps is cut out of its files when the run starts again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from outgrow.contracts import JsonDict, StepRecord
from outgrow.monitoring.trackers.points import flat, points_of, samples_of

_EXPERIMENT = "outgrow"
_RUN_TAG = "outgrow.run"
_PARAMETERS_A_CALL = 100
_LONGEST_PARAMETER = 6000
_LONGEST_NAME = 250
_NO_NAME = re.compile(r"[^\w\-. /:]", re.ASCII)


class MLflow:
    """The MLflow run of the run folder ``run`` in the file store ``folder``: the one that is there, else a new one."""

    def __init__(self, folder: Path, run: str, recipe: JsonDict) -> None:
        from mlflow import MlflowClient

        # MLflow makes this when it first sees a store, which it remembers: one that was removed since would lack it.
        (folder / ".trash").mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._client: Any = MlflowClient(tracking_uri=folder.absolute().as_uri())
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        self._experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        mine = self._client.search_runs([self._experiment], f"tags.`{_RUN_TAG}` = '{run}'", max_results=1)
        if mine:
            self._run = mine[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(self._experiment, tags={_RUN_TAG: run}, run_name=run).info.run_id
        self._add_parameters(flat(recipe), mine[0].data.params if mine else {})
        # A store without a folder of artifacts is none to MLflow, and a bucket has no empty folders.
        self._client.log_text(self._run, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "recipe.yaml")
        self._ended = False

    def record(self, record: StepRecord) -> None:
        from mlflow.entities import Metric

        if record.kind == "start":
            self._forget_after(record.step)
        when = int(record.time * 1000)
        points = {_NO_NAME.sub("_", name)[:_LONGEST_NAME]: value for name, value in points_of(record).items()}
        if points:
            self._client.log_batch(self._run, [Metric(name, value, when, record.step) for name, value in points.items()])
        if samples := samples_of(record):
            self._client.log_text(self._run, samples, f"samples/step-{record.step:08d}.md")
        self._ended = record.kind == "end"

    def close(self) -> None:
        self._client.set_terminated(self._run, "FINISHED" if self._ended else "FAILED")

    def _add_parameters(self, wanted: dict[str, str], there: dict[str, str]) -> None:
        """MLflow refuses to change a parameter: one that a restart came with another value for keeps its first."""
        from mlflow.entities import Param

        new = [
            Param(_NO_NAME.sub("_", name)[:_LONGEST_NAME], value[:_LONGEST_PARAMETER])
            for name, value in wanted.items()
            if _NO_NAME.sub("_", name)[:_LONGEST_NAME] not in there
        ]
        for at in range(0, len(new), _PARAMETERS_A_CALL):
            self._client.log_batch(self._run, params=new[at : at + _PARAMETERS_A_CALL])

    def _forget_after(self, step: int) -> None:
        """Metrics are files of lines ``time value step``."""
        for path in (self._folder / self._experiment / self._run / "metrics").rglob("*"):
            if not path.is_file():
                continue
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if len(line.split()) >= 3 and int(line.split()[2]) <= step]
            if kept and len(kept) < len(lines):
                aside = path.with_name(f".{path.name}.tmp")
                aside.write_text("".join(kept))
                aside.replace(path)
            elif not kept:
                path.unlink()
