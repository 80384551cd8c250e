"""Trackers: what each real library reads back, restarts, rebuilding, and trackers that raise, hang or are missing."""

from __future__ import annotations

import struct
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from outgrow.contracts import JsonDict, StepRecord
from outgrow.errors import PlanError, RunError, UserError
from outgrow.monitoring.events import EventLog, read_events
from outgrow.monitoring.trackers import Tracking, choice, open_trackers, rebuild, tracking
from outgrow.monitoring.trackers.points import flat, furthest_kept, last_trained, points_of
from outgrow.monitoring.trackers.wandb import WeightsAndBiases
from outgrow.recipes.schema import Recipe
from outgrow.storage import Storage

RUN = "runs/tiny-1234"
RECIPE: JsonDict = {
    "schema": 1,
    "run": {"name": "tiny", "seed": 3},
    "optimizer": {"kind": "adamw", "learning_rate": 0.001, "betas": [0.9, 0.95]},
}


def record(kind: str, step: int, **values: Any) -> StepRecord:
    return StepRecord.from_dict({"kind": kind, "attempt": "a", "time": 1e9 + step, "step": step, "steps": 9} | values)


def first_start() -> list[StepRecord]:
    """Six steps, of which the checkpoint has four."""
    steps = [record("step", n, loss=float(n), learning_rate=1e-3, detail={"memory": {"anon": 7}}) for n in range(1, 7)]
    return [record("start", 0), *steps[:4], record("checkpoint", 4, detail={"bytes": 10, "copy_s": 0.5}), *steps[4:]]


def second_start() -> list[StepRecord]:
    """Goes on after the fourth."""
    steps = [record("step", n, loss=100.0 + n) for n in range(5, 10)]
    said = {"streams": {"web": 2.0, "code": 3.0}, "samples": [{"prompt": "Once", "text": " upon a time"}]}
    return [record("start", 4), *steps, record("validation", 9, loss=2.5, detail=said), record("end", 9)]


LOSSES = [(n, float(n)) for n in range(1, 5)] + [(n, 100.0 + n) for n in range(5, 10)]


def log_and_track(storage: Storage, node: Path, names: Sequence[str], starts: Sequence[list[StepRecord]]) -> list[str]:
    """One process after another says its records as ``trainers.records`` does; gives what is said of trackers."""
    gone: list[str] = []
    for records in starts:
        opened = Tracking(open_trackers(names, RECIPE, storage, RUN, node), lambda name, why: gone.append(f"{name}: {why}"))
        log = EventLog(storage, RUN, [opened.tell])
        for each in records:
            log.write(each)
        log.flush()
        opened.close()
        log.close()
    return gone


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    made = Storage(str(tmp_path / "storage") if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    made.write(f"{RUN}/run.json", b"{}")
    return made


def brought(storage: Storage, name: str, to: Path) -> Path:
    """A copy of the tracker's files as they lie in the run folder."""
    from outgrow.monitoring.trackers.mirror import bring

    bring(storage, f"{RUN}/{name}", to)
    return to


# --- what the libraries read ------------------------------------------------------------------------------------------


def tensorboard_of(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    tags = read.Tags()
    scalars = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags["scalars"]}
    texts = {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in read.Tensors(tag)] for tag in tags["tensors"]}
    return scalars | texts


def test_tensorboard_shows_a_step_that_was_trained_again_once_and_rebuilt_the_same(storage: Storage, tmp_path: Path) -> None:
    assert log_and_track(storage, tmp_path / "node", ["tensorboard"], [first_start(), second_start()]) == []
    live = tensorboard_of(brought(storage, "tensorboard", tmp_path / "live"))
    assert live["train/loss"] == LOSSES
    assert live["validation/loss.code"] == [(9, 3.0)] and live["checkpoint/bytes"] == [(4, 10.0)]
    assert live["samples"] == [(9, "**Once** upon a time")]
    assert "name: tiny" in live["recipe"][0][1]
    assert rebuild("tensorboard", RECIPE, storage, RUN, tmp_path / "node") == 16 - 2
    assert tensorboard_of(brought(storage, "tensorboard", tmp_path / "rebuilt")) == live


def mlflow_of(folder: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1
    run = runs[0]
    history = {
        name: [(metric.step, metric.value, metric.timestamp) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return {"params": run.data.params, "status": run.info.status, "name": run.info.run_name} | history


def test_mlflow_goes_on_in_one_run_and_rebuilt_is_the_same(storage: Storage, tmp_path: Path) -> None:
    assert log_and_track(storage, tmp_path / "node", ["mlflow"], [first_start()]) == []
    assert mlflow_of(brought(storage, "mlflow", tmp_path / "killed"))["status"] == "FAILED"
    assert log_and_track(storage, tmp_path / "node", ["mlflow"], [second_start()]) == []
    live = mlflow_of(brought(storage, "mlflow", tmp_path / "live"))
    assert [(step, value) for step, value, _ in live["train/loss"]] == LOSSES
    assert live["params"] == flat(RECIPE) and live["params"]["optimizer.betas"] == "[0.9, 0.95]"
    assert (live["status"], live["name"]) == ("FINISHED", "tiny-1234")
    rebuild("mlflow", RECIPE, storage, RUN, tmp_path / "node")
    assert mlflow_of(brought(storage, "mlflow", tmp_path / "rebuilt")) == live


def wandb_rows(folder: Path) -> list[list[dict[str, str]]]:
    """The history of every offline run, the older first, read from their files: records in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    histories = []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        assert data[:4] == b":W&B"
        rows = []
        for part in _leveldb_records(data):
            read = Record.FromString(part)
            if read.HasField("history"):
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in read.history.item})
            if read.HasField("run"):
                assert read.run.run_id == "tiny-1234"
        histories.append(rows)
    return histories


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield whole
            whole = b""


def wandb_losses(rows: list[dict[str, str]]) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row["train/loss"])) for row in rows if "train/loss" in row]


def test_wandb_stays_offline_under_one_id_and_rebuilt_has_each_step_once(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write(f"{RUN}/run.json", b"{}")
    assert log_and_track(storage, tmp_path / "node", ["wandb"], [first_start(), second_start()]) == []
    live = wandb_rows(tmp_path / RUN / "wandb")
    assert [wandb_losses(rows) for rows in live] == [[(n, float(n)) for n in range(1, 7)], LOSSES[4:]]
    rebuild("wandb", RECIPE, storage, RUN, tmp_path / "node")
    rebuilt = wandb_rows(tmp_path / RUN / "wandb")
    assert [wandb_losses(rows) for rows in rebuilt] == [LOSSES]


def test_wandb_s_file_is_whole_once_it_is_closed(tmp_path: Path) -> None:
    """The last 32 kB lie in wandb's own process until that has closed the file, which it does in its own time."""
    tracker = WeightsAndBiases(tmp_path / "wandb", "tiny-1234", RECIPE)
    tracker.record(first_start()[1])
    tracker.close()
    assert [wandb_losses(rows) for rows in wandb_rows(tmp_path / "wandb")] == [[(1, 1.0)]]
    own = {child.pid for child in psutil.Process().children(recursive=True)}
    assert not [each.info for each in psutil.process_iter(["name"]) if each.pid in own and each.info["name"] == "wandb-core"]


# --- which records count ----------------------------------------------------------------------------------------------


def test_what_a_later_start_went_back_behind_is_void() -> None:
    starts = [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("start", 2),
        ("step", 3),
        ("step", 4),
        ("start", 1),
        ("step", 2),
    ]
    records = [record(kind, step, loss=float(at)) for at, (kind, step) in enumerate(starts)]
    kept = list(last_trained(records, furthest_kept(records)))
    assert [(r.kind, r.step, r.loss) for r in kept] == [
        ("start", 0, 0.0),
        ("step", 1, 1.0),
        ("start", 1, 7.0),
        ("step", 2, 8.0),
    ]
    # The slow twin: each start throws away what was said of later steps.
    slow: list[StepRecord] = []
    for each in records:
        slow = [r for r in slow if r.step <= each.step] if each.kind == "start" else slow
        slow.append(each)
    assert kept == slow


def test_numbers_that_are_not_finite_are_left_out() -> None:
    assert points_of(record("step", 3, loss=float("nan"), grad_norm=2.0)) == {"train/grad_norm": 2.0, "train/tokens": 0.0}


# --- trackers that fail -----------------------------------------------------------------------------------------------


class Raises:
    def record(self, record: StepRecord) -> None:
        raise RuntimeError(f"no room at step {record.step}")

    def close(self) -> None:
        raise AssertionError("closed after it failed")


class Hangs:
    """Never comes back from its first record."""

    def __init__(self, held: threading.Event) -> None:
        self._held = held

    def record(self, record: StepRecord) -> None:
        self._held.wait()

    def close(self) -> None:
        raise AssertionError("closed while it hangs")


class Hears:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def record(self, record: StepRecord) -> None:
        self.steps.append(record.step)

    def close(self) -> None:
        self.closed = True


def exits() -> tracking.Tracker:
    raise SystemExit(1)


def test_trackers_that_raise_hang_or_exit_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_S", 0.5)
    held, hears, gone = threading.Event(), Hears(), list[tuple[str, str]]()
    opened = Tracking(
        {"raises": Raises, "hangs": lambda: Hangs(held), "exits": exits, "hears": lambda: hears},
        lambda name, why: gone.append((name, why)),
    )
    started = time.monotonic()
    for step in range(500):
        opened.tell(record("step", step))
    assert time.monotonic() - started < 0.5
    opened.close()
    assert time.monotonic() - started < 2
    assert hears.steps == list(range(500)) and hears.closed
    assert sorted(gone) == [
        ("exits", "SystemExit: 1"),
        ("hangs", "it has not come to an end in time"),
        ("raises", "RuntimeError: no room at step 0"),
    ]
    held.set()


@pytest.mark.parametrize("limit", ["QUEUE_RECORDS", "BUSY_S"])
def test_a_tracker_that_hangs_is_dropped_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(tracking, "QUEUE_RECORDS", 10 if limit == "QUEUE_RECORDS" else 10_000)
    monkeypatch.setattr(tracking, "BUSY_S", 0.05 if limit == "BUSY_S" else 1e9)
    held, gone = threading.Event(), list[str]()
    opened = Tracking({"hangs": lambda: Hangs(held)}, lambda name, why: gone.append(why))
    deadline = time.monotonic() + 10
    while not gone and time.monotonic() < deadline:
        opened.tell(record("step", 1))
        time.sleep(0.005)
    opened.tell(record("step", 2))
    assert gone == ["it is 10 records behind" if limit == "QUEUE_RECORDS" else "it has not returned for 0 s"]
    held.set()
    opened.close()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "r", "seed": 1},
            "model": {"kind": "architecture", "family": "llama"},
            "data": {
                "sequence_length": 32,
                "tokenizer": {"kind": "folder", "path": "none"},
                "streams": [{"name": "none", "source": {"kind": "text", "path": "none"}}],
            },
            "batch": {"rows": 1},
            "duration": {"steps": 1},
            "optimizer": {"kind": "adamw", "learning_rate": 0.1},
            "schedule": {"kind": "constant"},
            "logging": {"trackers": ["tensorboard", "mlflow", "wandb"]},
        }
    )
    choice.check_trackers(recipe)
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(PlanError) as caught:
        choice.check_trackers(recipe)
    assert "mlflow-skinny is not installed" in str(caught.value)
    assert "pip install 'outgrow[mlflow]', or leave out: logging.trackers=[tensorboard,wandb]" in str(caught.value)
    assert caught.value.where == "logging.trackers"


def test_an_unknown_tracker_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean wandb"):
        choice.known_trackers(["wandbs"])


def test_a_folder_that_cannot_be_written_drops_the_tracker_alone(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write(f"{RUN}/tensorboard", b"a file in its place")
    gone = log_and_track(storage, tmp_path / "node", ["tensorboard"], [first_start()])
    assert len(gone) == 1 and gone[0].startswith("tensorboard: FileExistsError")
    assert len(list(read_events(storage, RUN))) == 8


# --- on the command line ----------------------------------------------------------------------------------------------


def test_runs_track_makes_the_files_anew_and_leaves_a_running_one_alone(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from outgrow.cli.runs import app
    from outgrow.cluster import run_lock
    from outgrow.cluster.runs import RunFile

    storage = Storage(str(tmp_path / "storage"))
    recipe = RECIPE | {"logging": {"trackers": ["tensorboard", "mlflow"]}}
    stored = RunFile(name="tiny", fingerprint="1234", created="2026-11-21T00:00:00+00:00", recipe=recipe)
    storage.write_json(f"{RUN}/run.json", stored.to_dict())
    log_and_track(storage, tmp_path / "node", [], [first_start(), second_start()])
    site = tmp_path / "site.yaml"
    site.write_text(f"schema: 1\nstorage: storage\nmonitoring: {{folder: {tmp_path}/state}}\n")
    words = ["track", "tiny", "--site", str(site)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["tensorboard", "14"], ["mlflow", "14"]]
    assert tensorboard_of(tmp_path / "storage" / RUN / "tensorboard")["train/loss"] == LOSSES
    again = CliRunner().invoke(app, [*words, "--to", "tensorboard"], catch_exceptions=False)
    assert len(again.stdout.splitlines()) == 1
    assert len(list((tmp_path / "storage" / RUN / "tensorboard").iterdir())) == 1
    with run_lock.hold(storage, RUN), pytest.raises(RunError, match="it goes on just now"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    with pytest.raises(UserError, match="did you mean wandb"):
        CliRunner().invoke(app, [*words, "--to", "wandbs"], catch_exceptions=False)
