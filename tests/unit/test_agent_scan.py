"""Which runs an agent sees below its folder, for how long, and what of it is removed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded_ranks import make_step, recorder, site_at, started

from outgrow.monitoring.agent import prune as pruning
from outgrow.monitoring.agent import scan as scanning
from outgrow.monitoring.agent.prune import prune, prune_stalls
from outgrow.monitoring.agent.scan import Scanner, scan, shown
from outgrow.monitoring.recording.attempt import FILE, attempt_folder, node_folder, records_folder
from outgrow.monitoring.recording.recorder import Recorder, is_alive, start_ticks

HOUR_S, DAY_S = 3600.0, 86_400.0


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return node_folder(site_at(tmp_path, 9640))


def test_the_newest_start_of_each_run(node: Path) -> None:
    now = time.time()
    for run in ("b", "a"):
        for number in range(3):
            recorder(started(node, run, attempt=f"{number}", when=now - 100 + number)).close("finished")
    found = scan(records_folder(node))
    assert [(run.facts.run, run.facts.attempt, run.state) for run in found] == [("a", "2", "finished"), ("b", "2", "finished")]


def test_no_folder_is_no_run(node: Path) -> None:
    assert scan(records_folder(node)) == []


def test_an_ended_run_is_read_once_and_a_new_start_is_seen(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_SETTLED_S", 0.0)
    monkeypatch.setattr(scanning, "is_alive", lambda record: False)
    recorder(started(node, "run", when=time.time() - 50)).close("finished")
    scanner = Scanner(records_folder(node))
    [first] = scanner.scan()
    [again] = scanner.scan()
    assert again is first
    recorder(started(node, "run", attempt="b")).close("failed")
    assert [(run.facts.attempt, run.state) for run in scanner.scan()] == [("b", "failed")]


def test_a_lost_run_is_read_once_and_a_restarting_one_again(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may hold hundreds that a kill has ended; but one that waits for its restart may yet be lost."""
    monkeypatch.setattr(scanning, "_SETTLED_S", 0.0)
    recorder(started(node, "gone", when=time.time() - 50))
    recorder(started(node, "waits", when=time.time() - 50)).close("restarting")
    scanner = Scanner(records_folder(node))
    assert scanner.scan()[0] is not scanner.scan()[0], "its process is there"
    monkeypatch.setattr(scanning, "is_alive", lambda record: False)
    (gone, waits), again = scanner.scan(), scanner.scan()
    assert (gone.state, waits.state) == ("lost", "restarting")
    assert again[0] is gone and again[1] is not waits


def test_a_start_without_facts_is_told_by_the_one_before(node: Path) -> None:
    """Facts are written once the model is built: until then a run that was started again must not look lost."""
    before = started(node, "run", (0, 1), when=time.time() - 100)
    recorder(before).close("restarting")
    scanner = Scanner(records_folder(node))
    folder = attempt_folder(node, "run", time.time(), "b")
    folder.mkdir()
    assert [run.facts.attempt for run in scanner.scan()] == ["a"]
    recorder(folder)
    [run] = scanner.scan()
    assert (run.facts.attempt, run.facts.local_ranks, run.state) == ("b", (0,), "starting")
    assert run.facts.started == pytest.approx(time.time(), abs=5)


def test_a_first_start_without_facts_is_life(node: Path) -> None:
    scanner = Scanner(records_folder(node))
    recorder(attempt_folder(node, "run", time.time(), "a"))
    assert (scanner.scan(), scanner.has_unnamed_life) == ([], True)
    started(node, "run", when=time.time() + 1, attempt="b")
    assert (len(scanner.scan()), scanner.has_unnamed_life) == (1, False)


def test_facts_that_are_torn_later_stay_known(node: Path) -> None:
    folder = started(node, "run")
    recorder(folder)
    scanner = Scanner(records_folder(node))
    assert len(scanner.scan()) == 1
    (folder / FILE).write_text('{"run": "ru')
    assert [run.facts.run for run in scanner.scan()] == ["run"]
    assert scan(records_folder(node)) == []
    (folder / FILE).unlink()
    assert [run.facts.run for run in scanner.scan()] == ["run"]


def test_what_is_no_run_is_passed_over(node: Path, tmp_path: Path) -> None:
    recorder(started(node, "run"))
    records = records_folder(node)
    (records / "file").write_text("x")
    (records / "empty").mkdir()
    (records / "other" / "no-attempt").mkdir(parents=True)
    (records / "linked").symlink_to(records / "run")
    os.rename(started(node, "name").parent, records / "not-its-name")
    assert [run.facts.run for run in scan(records)] == ["run"]


def test_a_run_is_shown_for_some_time_after_its_end(node: Path) -> None:
    recorder(started(node, "done")).close("finished")
    recorder(started(node, "live"))
    now = time.time()
    runs = scan(records_folder(node))
    assert [run.facts.run for run in shown(runs, now + HOUR_S - 60)] == ["done", "live"]
    assert [run.facts.run for run in shown(runs, now + HOUR_S + 60)] == ["live"]
    assert [run.facts.run for run in shown(runs, now + 100 * DAY_S)] == ["live"]


def test_a_lost_run_is_shown_for_a_day(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder(started(node, "run"))
    monkeypatch.setattr(scanning, "is_alive", lambda record: False)
    [run] = scan(records_folder(node))
    assert run.state == "lost"
    assert len(shown([run], time.time() + DAY_S - 60)) == 1
    assert shown([run], time.time() + DAY_S + 60) == []


def test_a_zombie_is_dead() -> None:
    """A rank that was killed stays in the list of processes until its parent asks for its exit code."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    record = {"pid": float(child.pid), "pid_start": start_ticks(child.pid)}
    assert is_alive(record)
    child.kill()
    deadline = time.monotonic() + 10
    while is_alive(record) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(record)
    assert child.wait() == -9


def test_eight_ranks_and_twenty_old_runs_are_cheap(node: Path) -> None:
    for number in range(20):
        recorder(started(node, f"old-{number}", when=time.time() - 1000 - number)).close("finished")
    live = started(node, "live", range(8))
    kept = [recorder(live, rank) for rank in range(8)]
    for record in kept:
        record.enter_steps()
        make_step(record, 1)
    scanner = Scanner(records_folder(node))
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        assert len(scanner.scan()) == 21
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.02, times


# --- what is removed --------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def ended(node: Path, run: str, attempt: str, when: float) -> Path:
    folder = started(node, run, attempt=attempt, when=when)
    recorder(folder).close("finished")
    return folder


def test_the_newest_five_starts_stay(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "is_alive", lambda record: False)
    folders = [ended(node, "run", str(number), time.time() - 100 + number) for number in range(8)]
    (folders[0] / "attempt.json.123").write_text("half")
    (folders[0] / "rank-00000.123").write_text("half")
    prune(records_folder(node), time.time())
    assert [folder.exists() for folder in folders] == [False] * 3 + [True] * 5


def test_a_start_with_a_living_rank_stays(node: Path) -> None:
    kept = Recorder(started(node, "run", when=1000.0), 0, launched=1000.0, before=None, stall_after_s=1)
    for number in range(6):
        ended(node, "run", str(number), time.time() - 100 + number)
    before = names(records_folder(node))
    prune(records_folder(node), time.time() + 100 * DAY_S)
    assert names(records_folder(node)) == before  # all are of this process
    kept.close("finished")


def test_a_run_that_nobody_has_touched_for_a_month_goes(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "is_alive", lambda record: False)
    ended(node, "run", "a", time.time())
    prune(records_folder(node), time.time() + 29 * DAY_S)
    assert names(records_folder(node))
    prune(records_folder(node), time.time() + 31 * DAY_S)
    assert names(records_folder(node)) == []


def test_what_is_not_ours_stays(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "is_alive", lambda record: False)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rank-00000.rec").write_text("precious")
    folder = ended(node, "run", "a", time.time())
    (folder / "notes.txt").write_text("mine")
    (folder / "rank-00007.rec").symlink_to(outside / "rank-00000.rec")
    records = records_folder(node)
    (records / "run" / "000000000000001-x").symlink_to(outside)
    (records / "linked").symlink_to(outside)
    (records / "mine").mkdir()
    (records / "mine" / "rank-00000.rec").write_text("mine")
    prune(records, time.time() + 31 * DAY_S)
    assert (outside / "rank-00000.rec").read_text() == "precious"
    assert sorted(os.listdir(folder)) == ["notes.txt", "rank-00007.rec"]
    assert (records / "mine" / "rank-00000.rec").read_text() == "mine"
    assert (records / "linked").is_symlink() and (records / "run" / "000000000000001-x").is_symlink()


def test_stacks_of_a_stall_go_after_a_month(tmp_path: Path) -> None:
    (tmp_path / "stalls/run/20260101T000000-agent").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "stalls/linked").symlink_to(tmp_path / "precious")
    prune_stalls(tmp_path / "none", time.time())
    prune_stalls(tmp_path / "stalls", time.time() + 29 * DAY_S)
    assert names(tmp_path / "stalls/run")
    prune_stalls(tmp_path / "stalls", time.time() + 31 * DAY_S)
    assert names(tmp_path) == ["precious", "stalls", "stalls/linked"]


def test_the_agent_imports_nothing_heavy() -> None:
    code = "import sys, outgrow.monitoring.agent.lifetime; print([name for name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = ("torch", "ray", "transformers", "streaming", "numpy", "tokenizers", "pandas", "pyarrow")
    assert not [name for name in heavy if f"'{name}'" in loaded]
