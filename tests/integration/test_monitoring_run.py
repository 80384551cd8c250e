"""What a user sees of a run: ranks killed and stopped, disks filled, Prometheus and the driver lost, all on real servers.

One story is told once for the whole module (see ``monitored_story``); the tests look at what it has left behind.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor import need
from full_disk import small_disk
from monitored_story import Story, damage_copies, is_there, kill, nvml_agent, story

from outgrow.contracts import StepRecord
from outgrow.monitoring.alerts.rules import ALERTS
from outgrow.monitoring.dashboards.written import concrete, expressions
from outgrow.monitoring.events import read_events
from outgrow.storage import Storage

pytestmark = [pytest.mark.monitoring, pytest.mark.timeout(1500)]

MAY_BE_EMPTY = {
    "OutgrowCheckpointTooOld": "ten minutes without a checkpoint are longer than the test",
    "OutgrowLossSpike": "it compares with the hour that ended ten minutes ago",
    "Ranks: All ranks B": "the peak of a device's allocator: there is none on a CPU",
    "Ranks: All ranks D": "retries of a device's allocator",
    "Run: What went wrong B": "retries of a device's allocator",
}
"""Expressions without a value in the whole story, by the end of their name, and why."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    need("prometheus", "prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("monitored")
    with small_disk(folder / "storage", 100 * 2**20), story(folder) as scene, nvml_agent(scene):
        place = scene.place
        place.run("data", "build", "main.yaml")
        place.run("data", "place", "--apply")
        _a_run_with_faults(scene)
        _a_run_that_diverges(scene)
        yield scene


def _a_run_with_faults(scene: Story) -> None:
    place = scene.place
    first = place.start("train", "main.yaml")
    scene.wait(lambda: scene.step("main") >= 45, "step 45 of main", timeout_s=300)
    damage_copies(place.folder / "usb")

    scene.notes["killed at"] = scene.step("main")
    kill(scene.pid("main", 1))
    scene.wait(lambda: scene.query('outgrow_run_restarts_total{cause="rank_lost"} == 1') != [], "a restart")
    scene.wait(lambda: scene.step("main") > scene.notes["killed at"] + 10, "steps after the restart")

    with contextlib.ExitStack() as full:
        full.enter_context(_filled(place.folder / "storage"))
        scene.wait(lambda: scene.query('outgrow_run_checkpoints_total{result="failed"} > 0') != [], "a failed checkpoint")
    scene.notes["step after the full disk"] = scene.step("main")

    before, server = scene.step("main"), scene.processes()["prometheus"]
    kill(server)
    scene.wait(lambda: scene.step("main") > before + 10, "steps without Prometheus")
    assert not is_there(server)
    assert first.poll() is None
    place.run_beside("monitor", "up")
    scene.wait(lambda: _answers(scene), "Prometheus again")

    # In a step, not in the validation after every fortieth: that may take ten minutes before it counts as stalled.
    scene.wait(lambda: 22 <= scene.step("main") % 40 <= 34, "steps far from a validation")
    with _stopped(scene.pid("main", 1)):
        scene.wait(lambda: scene.state("main") == "stalled", "a stalled run", timeout_s=30)
        scene.wait(lambda: "OutgrowStalled" in scene.alerts(), "the alert", timeout_s=60)
        scene.wait(lambda: list(place.folder.glob("monitoring/*/stalls/*/*/rank-00001*")) != [], "stacks", timeout_s=30)
    scene.wait(lambda: scene.state("main") == "running", "a running run", timeout_s=30)

    kill(first.pid)
    first.wait()
    scene.wait(lambda: scene.state("main") == "lost", "a lost run", timeout_s=60)
    scene.notes["metrics of the lost run"] = scene.metrics()
    scene.wait(lambda: scene.query('outgrow_run_state{state="lost"} == 1') != [], "a lost run in Prometheus")
    scene.end_ray()

    last = scene.step("main") + 80
    place.run("train", "main.yaml", f"duration.steps={last}")
    scene.notes["last"] = last
    scene.wait(lambda: scene.state("main") == "finished", "the end", timeout_s=30)
    time.sleep(3)  # two more scrapes
    scene.notes["ended"] = time.time()
    scene.notes["/runs"] = scene.run("main")


def _a_run_that_diverges(scene: Story) -> None:
    """One rank slow, a loader that hangs, an agent that hangs for longer, and a learning rate that ruins it in the end."""
    scene.write("ruined", steps=600, schedule="eventful", seconds=0.02, slow_rank=1, slow_s=0.3, spike=400)
    command = scene.place.start("train", "ruined.yaml")
    scene.wait(lambda: scene.step("ruined") >= 20, "step 20 of ruined", timeout_s=300)
    (starved,) = [alert.expr for alert in ALERTS if alert.name == "OutgrowDataStarved"]
    for _ in range(5):  # once where the start was quick: the rule is of the share of the last five minutes
        with _stopped(scene.loader_worker("ruined", 0)):
            time.sleep(15)
        time.sleep(3)  # two more scrapes
        if scene.query(starved):
            break
    # The rule on a lost agent looks back in steps of a minute: one of them has to fall into this run before the agent stops.
    ranks = "max_over_time((outgrow_rank_up{run=~'ruined-.*'} == 1)[1h:1m])"
    scene.wait(lambda: scene.query(ranks) != [], "a minute with ranks of ruined", timeout_s=90)
    with _stopped(scene.processes()["agent"]):
        time.sleep(130)
    scene.wait(lambda: command.poll() is not None, "the end of the ruined run", timeout_s=240)
    assert command.returncode == 1
    assert "not finite" in scene.place.log()
    scene.wait(lambda: scene.query("outgrow_run_nonfinite_steps_total > 0") != [], "a non-finite step", timeout_s=30)


def _answers(scene: Story) -> bool:
    try:
        return bool(scene.query("up"))
    except OSError:
        return False


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[None]:
    """No byte is left on the disk of ``folder``."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        path.unlink()


# --- what is seen -----------------------------------------------------------------------------------------------------


def records(told: Story, name: str) -> list[StepRecord]:
    storage = Storage(str(told.place.folder / "storage"))
    (run,) = [run for run in storage.names("runs") if run.startswith(f"{name}-")]
    return list(read_events(storage, f"runs/{run}"))


def test_every_expression_of_every_panel_and_rule_has_had_a_value(told: Story) -> None:
    runs = [folder.name for folder in told.place.folder.glob("monitoring/*/records/*")]
    asked = [
        (where, [concrete(expression, run=run, rate_s=10) for run in (*runs, ".+")]) for where, expression in expressions()
    ]
    asked += [(alert.name, [alert.expr]) for alert in ALERTS]
    assert len(asked) > 140
    empty = [where for where, forms in asked if not any(told.ever(form) for form in forms)]
    assert not [where for where in empty if not where.endswith(tuple(MAY_BE_EMPTY))], empty
    assert len(empty) <= 5


def test_counters_agree_with_events_and_with_an_independent_count(told: Story) -> None:
    found = records(told, "main")
    last = [record for record in found if record.kind == "step"][-1]
    counters = last.detail["counters"]
    for name, kind in (("steps", ""), ("samples", ""), ("tokens", "valid"), ("tokens", "padding")):
        slot = "padding" if kind == "padding" else name
        label = f'{{kind="{kind}"}}' if kind else ""
        at_end = (
            f"max by (run) (max_over_time(outgrow_run_{name}_total{label}[1h])) and on (run) outgrow_run_info{{name='main'}}"
        )
        shown = [float(value) for _, value in told.ever(at_end)[0]["values"]][-1]
        assert shown == counters[slot], name
    # Every start trains each step from where it began to where it ended; what is logged tells both ends within a log interval.
    starts = [record for record in found if record.kind == "start"]
    assert counters["steps"] > told.notes["last"] - 1
    assert counters["steps"] - told.notes["last"] >= 1
    again = 0
    for before, after in zip(starts, starts[1:], strict=False):
        reached = max(record.step for record in found if record.attempt == before.attempt)
        again += reached - after.step
    assert 0 <= counters["steps"] - told.notes["last"] - again <= 2 * (len(starts) - 1)
    # The last step of an epoch has the rows that are left.
    short = 16 * counters["steps"] - counters["samples"]
    assert 0 <= short <= 16 * (last.epoch + 2)
    assert counters["tokens"] + counters["padding"] == 128 * counters["samples"]


def test_wall_seconds_add_up(told: Story) -> None:
    record = told.notes["/runs"]["ranks"]["0"]["record"]
    counted = sum(value for name, value in record.items() if name.startswith("wall_s."))
    wall = record["touched"] - record["first_start"]
    assert counted == pytest.approx(wall, rel=0.01)
    for kind in ("productive", "init", "checkpoint", "restore", "recompute", "stalled"):
        assert record[f"wall_s.{kind}"] > 0, kind


def test_a_killed_rank_is_a_restart_with_its_cause_and_lost_goodput(told: Story) -> None:
    record = told.notes["/runs"]["ranks"]["0"]["record"]
    assert record["restarts.rank_lost"] == 1
    assert record["restarts.resumed"] == 1
    assert record["wall_s.recompute"] > 0
    goodput = record["wall_s.productive"] / (record["touched"] - record["first_start"])
    assert 0.05 < goodput < 0.95
    causes = [entry.detail.get("cause") for entry in records(told, "main") if entry.kind == "start"]
    assert causes == ["", "rank_lost", "resumed"]


def test_the_agent_says_that_a_run_whose_driver_was_killed_is_gone(told: Story) -> None:
    text = told.notes["metrics of the lost run"]
    (state,) = [line for line in text.splitlines() if line.startswith("outgrow_run_state") and 'state="lost"' in line]
    (active,) = [line for line in text.splitlines() if line.startswith("outgrow_run_active")]
    assert state.endswith(" 1.0")
    assert active.endswith(" 1.0")


def test_a_rank_has_at_most_150_series(told: Story) -> None:
    text = told.notes["metrics of the lost run"]
    lines = [line for line in text.splitlines() if line.startswith("outgrow_") and 'run="' in line]
    assert 50 < len(lines) / 2 <= 150


def test_the_report_and_top_show_the_run(told: Story) -> None:
    told.place.run_beside("report", "main", "--output", "report.html")
    page = (told.place.folder / "report.html").read_text()
    assert "rank_lost" in page or "rank lost" in page
    assert "step" in told.place.run_beside("top", "main", "--once")


def test_no_secret_is_in_what_is_shown(told: Story) -> None:
    token = (told.place.folder / "token").read_text().strip()
    for path in told.place.folder.glob("monitoring/**/*"):
        if path.is_file() and path.suffix in (".json", ".yml", ".log", ".rec", ".ini"):
            assert token.encode() not in path.read_bytes(), path


def test_down_ends_all_and_nothing_else(told: Story) -> None:
    beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        pids = told.processes()
        told.place.run_beside("monitor", "down")
        assert not [name for name, pid in pids.items() if is_there(pid)]
        assert is_there(beside.pid)
    finally:
        beside.kill()
        beside.wait()
