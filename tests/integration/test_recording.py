"""What ranks record of a real run that is killed and goes on, against the run's own rows and the clock."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from token_stores import Dataset
from training_jobs import TRAIN_WORKER, job, records, two_streams

from outgrow.cluster.local import run_local
from outgrow.contracts import CheckpointRef, JobSpec, RunResult
from outgrow.errors import TrainingError
from outgrow.monitoring.recording.attempt import AttemptFacts, node_folder, read_facts, records_folder
from outgrow.monitoring.recording.rank_file import file_name, read_record
from outgrow.monitoring.recording.slots import PHASES, STATES, WALL
from outgrow.recipes.schema.site import Site
from outgrow.trainers.checkpoint import saving
from outgrow.trainers.checkpoint.commit import commit

STEPS = 12
NOTING = "training_jobs:train_and_note_rows"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return two_streams(tmp_path_factory.mktemp("dataset"))


def run(spec: JobSpec, worker: str = TRAIN_WORKER) -> RunResult:
    return run_local(dataclasses.replace(spec, launched=time.time()), worker, on_record=lambda record: None)


def attempts(spec: JobSpec) -> list[Path]:
    """The starts of a run on this machine, oldest first."""
    return sorted((records_folder(node_folder(Site.model_validate(spec.site))) / spec.run.name).iterdir())


def record(attempt: Path, rank: int = 0) -> dict[str, float]:
    found = read_record(attempt / file_name(rank))
    assert found is not None
    return found


def noted(dataset: Dataset, name: str) -> list[dict[int, list[dict[str, Any]]]]:
    """What the loaders gave: for each start, oldest first, the notes of all ranks by step."""
    starts: dict[str, dict[int, list[dict[str, Any]]]] = {}
    paths = sorted((dataset.root / "runs" / name).glob("rows-*.jsonl"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        for note in map(json.loads, path.read_text().splitlines()):
            starts.setdefault(path.name.split("-")[2], {}).setdefault(note["step"], []).append(note)
    return list(starts.values())


def counted(steps: Sequence[list[dict[str, Any]]]) -> dict[str, int]:
    notes = [note for step in steps for note in step]
    rows, tokens = sum(len(note["rows"]) for note in notes), sum(note["tokens"] for note in notes)
    padding = sum(len(note["rows"]) * note["length"] for note in notes) - tokens
    return {"steps": len(steps), "samples": rows, "tokens": tokens, "padding": padding}


@dataclass(frozen=True)
class Killed:
    """A run of two ranks of which rank 0 was killed in its eighth step, and what was recorded before and after it went on, on
    one rank: a second group would cost ten seconds of starting, and tell no more."""

    spec: JobSpec
    first: dict[str, float]
    first_of_other: dict[str, float]
    second: dict[str, float]
    began: float
    ended: float


@pytest.fixture(scope="module")
def killed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    dies = {"at": 7, "rank": 0, "once": str(tmp_path_factory.mktemp("dies") / "died")}
    settings = {"schedule": {"kind": "custom", "factory": "training_jobs:dies", "options": dies}, "logging": {"every_steps": 3}}
    spec = job(dataset, "killed", STEPS, workers=2, **settings)
    began = time.time()
    with pytest.raises(TrainingError, match="rank 0 .* was killed by SIGKILL"):
        run(spec, NOTING)
    time.sleep(1.0)
    run(dataclasses.replace(spec, workers=1), NOTING)
    first, second = attempts(spec)
    return Killed(spec, record(first), record(first, 1), record(second), began, time.time())


def test_steps_that_are_done_are_counted_to_the_unit(dataset: Dataset, killed: Killed) -> None:
    before, after = noted(dataset, "killed")
    assert (max(before), min(after), max(after)) == (7, 4, STEPS - 1)
    del before[7]  # the step in which it died
    both = counted([*before.values(), *after.values()])
    assert counted(list(before.values())) == {name: killed.first[name] for name in both}
    assert both == {name: killed.second[name] for name in both}
    facts = read_facts(attempts(killed.spec)[1])
    assert facts is not None and killed.second["model_flops"] == pytest.approx(facts.flops_per_token * both["tokens"])
    assert (killed.second["step"], killed.second["furthest"], killed.second["restarts.resumed"]) == (STEPS, STEPS, 1)
    assert [STATES[int(record["state"])] for record in (killed.first, killed.second)] == ["running", "finished"]
    assert killed.second["recent_count"] == len(after)
    assert sum(killed.second[f"step_bucket.{number}"] for number in range(12)) == len(before) + len(after)


def test_every_second_since_the_first_start_has_a_kind(dataset: Dataset, killed: Killed) -> None:
    wall = {kind: killed.second[f"wall_s.{kind}"] for kind in WALL}
    assert sum(wall.values()) == pytest.approx(killed.second["touched"] - killed.began, rel=0.01)
    (end,) = records(dataset, "killed", "end")
    total = sum(wall.values())
    assert end.time - killed.began - 0.01 <= total <= killed.ended - killed.began + 0.01, "what is left ends processes"
    assert wall["idle"] >= 1.0 and all(wall[kind] > 0 for kind in ("init", "productive", "recompute", "checkpoint", "restore"))
    assert sum(killed.second[f"phase_s.{phase}"] for phase in PHASES[:5]) == pytest.approx(killed.second["step_sum_s"], rel=0.1)
    assert killed.second["step_sum_s"] <= wall["productive"] + wall["recompute"] + wall["stalled"]


def test_events_say_the_same_as_the_record(dataset: Dataset, killed: Killed) -> None:
    starts = records(dataset, "killed", "start")
    assert [start.detail["cause"] for start in starts] == ["", "resumed"]
    told = [AttemptFacts.from_dict(start.detail["facts"]) for start in starts]
    assert told == [read_facts(attempt) for attempt in attempts(killed.spec)]
    assert not any("unrecorded" in start.detail for start in starts)
    assert [(facts.run, facts.local_ranks) for facts in told] == [("killed", (0, 1)), ("killed", (0,))]
    logged, last = records(dataset, "killed", "step")[-1], killed.second
    for name in ("steps", "tokens", "samples", "padding", "checkpoints_committed"):
        assert records(dataset, "killed", "end")[0].detail["counters"][name] == last[name]
    assert logged.detail["memory"]["anon"] > 10e6
    assert (logged.loss, logged.grad_norm, logged.tokens_per_s) == (last["loss"], last["gradient_norm"], last["tokens_per_s"])
    assert records(dataset, "killed", "validation")[-1].loss == last["validation_loss"]
    saves = [save.detail for save in records(dataset, "killed", "checkpoint")]
    assert last["checkpoints_committed"] == len(saves) and not any("error" in save for save in saves)


def test_losses_of_ranks_make_up_the_loss(killed: Killed) -> None:
    """Of the last step that was logged before the kill."""
    one, other = sorted([killed.first["rank_loss"], killed.first_of_other["rank_loss"]])
    assert one < killed.first["loss"] == killed.first_of_other["loss"] < other
    assert killed.second["rank_loss"] == pytest.approx(killed.second["loss"])
    assert killed.second["measured_flops"] > 1e8


def test_counters_outlive_the_records_of_a_node(dataset: Dataset, killed: Killed) -> None:
    """What rank 0 said in events.jsonl goes on."""
    shutil.rmtree(records_folder(node_folder(Site.model_validate(killed.spec.site))) / "killed")
    longer = job(dataset, "killed", STEPS + 2)
    run(longer)
    after = record(attempts(longer)[0])
    assert after["steps"] == killed.second["steps"] + 2 and after["tokens"] > killed.second["tokens"]
    assert (
        after["first_start"] == killed.second["first_start"] and after["wall_s.recompute"] == killed.second["wall_s.recompute"]
    )
    assert after["restarts.resumed"] == 2


def test_another_run_of_the_same_name_counts_anew(dataset: Dataset) -> None:
    spec = job(dataset, "anew", 2)
    run(spec)
    shutil.rmtree(dataset.root / "runs/anew")
    run(job(dataset, "anew", 2))
    old, new = (record(attempt) for attempt in attempts(spec))
    assert old["steps"] == new["steps"] == 2 and new["restarts.resumed"] == 0 and new["first_start"] > old["touched"]


def test_where_nothing_can_be_recorded_training_goes_on_and_says_so(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = job(dataset, "unrecorded", 2)
    spec.site["monitoring"] = {"agent": False, "folder": str(tmp_path / "file")}
    assert run(spec).worker.step == 2
    (start,) = records(dataset, "unrecorded", "start")
    assert str(tmp_path / "file") in start.detail["unrecorded"]
    assert records(dataset, "unrecorded", "step")[-1].detail["counters"]["steps"] == 2


def test_a_failed_run_says_so_in_its_record(dataset: Dataset) -> None:
    explodes = {"kind": "custom", "factory": "training_jobs:explodes", "options": {"at": 2}}
    spec = job(dataset, "failed", 8, schedule=explodes, optimizer={"kind": "adamw", "learning_rate": 1e-3, "clip_norm": 0.0})
    with pytest.raises(TrainingError, match="not finite"):
        run(spec)
    last = record(attempts(spec)[0])
    assert STATES[int(last["state"])] == "failed" and last["nonfinite"] == 1


def test_a_save_in_flight_when_a_run_fails_is_told(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any) -> CheckpointRef:
        time.sleep(0.5)
        return commit(*arguments)

    monkeypatch.setattr(saving, "commit", slowly)
    explodes = {"kind": "custom", "factory": "training_jobs:explodes", "options": {"at": 4}}
    spec = job(dataset, "in-flight", 8, schedule=explodes, optimizer={"kind": "adamw", "learning_rate": 1e-3, "clip_norm": 0.0})
    with pytest.raises(TrainingError, match=r"not finite[^$]*step-00000004"):
        run(spec)
    (save,) = records(dataset, "in-flight", "checkpoint")
    assert save.detail["step"] == 4 and "error" not in save.detail
    assert record(attempts(spec)[0])["checkpoints_committed"] == 1


def test_the_last_checkpoint_that_fails_is_told(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> CheckpointRef:
        raise OSError("No space left")

    monkeypatch.setattr(saving, "commit", full)
    spec = job(dataset, "full", 3)
    with pytest.raises(TrainingError, match="was not committed"):
        run(spec)
    assert [save.detail["error"] for save in records(dataset, "full", "checkpoint")] == ["No space left"]
    assert record(attempts(spec)[0])["checkpoints_failed"] == 1
