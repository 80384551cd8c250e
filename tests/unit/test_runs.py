"""One command, one run: it resumes its own folder, says what changed, and two processes never write the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outgrow.cluster import run_lock
from outgrow.cluster.runs import Claim, choose, claim, find_run, status, stored_runs
from outgrow.contracts import StepRecord
from outgrow.errors import IntegrityError, RunError
from outgrow.monitoring.events import EventLog
from outgrow.recipes.schema import Recipe
from outgrow.storage import Storage

STORE = "0123"


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "schema": 1,
        "run": {"name": "small", "seed": 1},
        "model": {"kind": "architecture", "family": "llama"},
        "data": {
            "sequence_length": 128,
            "tokenizer": {"kind": "train", "vocab_size": 4096},
            "streams": [{"name": "a", "source": {"kind": "text", "path": "texts"}}],
        },
        "batch": {"rows": 32},
        "duration": {"steps": 100},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    }
    return Recipe.model_validate(data | changes)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def take(storage: Storage, asked: Recipe | None = None, store: str = STORE, **how: bool) -> Claim:
    with claim(storage, asked or recipe(), store, **{"fresh": False, "accept": False, **how}) as taken:
        return taken


# --- which folder -----------------------------------------------------------------------------------------------------


def test_the_same_command_resumes(storage: Storage) -> None:
    first, second = take(storage), take(storage)
    assert not first.resumed
    assert second.resumed
    assert first.run == second.run
    assert first.run.folder == f"runs/small-{first.run.fingerprint[:8]}"
    assert second.differences == ()
    assert (Path(storage.root) / first.run.folder / "recipe.yaml").read_text().startswith("schema: 1\nrun:\n  name: small\n")


def test_fresh_counts_up_and_deletes_nothing(storage: Storage) -> None:
    folders = [take(storage, fresh=n > 0).run.folder for n in range(11)]
    assert folders == [folders[0], *(f"{folders[0]}-{n}" for n in range(2, 12))]
    assert [run.ref.folder for run in stored_runs(storage)] == folders
    assert take(storage).run.folder == folders[-1]


def test_an_extended_run_goes_on_and_says_what_changed(storage: Storage) -> None:
    take(storage)
    longer = take(storage, recipe(duration={"steps": 200}))
    assert longer.resumed
    assert [str(d) for d in longer.differences] == ["duration.steps: 100 -> 200 (the run ends earlier or later)"]
    assert take(storage, recipe(duration={"steps": 200})).differences == ()


def test_a_changed_learning_rate_is_taken_on_request_alone(storage: Storage) -> None:
    started = take(storage)
    changed = recipe(optimizer={"kind": "adamw", "learning_rate": 2e-3}, duration={"steps": 200})
    with pytest.raises(RunError) as caught:
        take(storage, changed)
    assert str(caught.value) == (
        f"{started.run.folder}: the recipe differs from the one that this run was started with:\n"
        "  optimizer.learning_rate: 0.001 -> 0.002 (the loss takes another course from here)\n"
        "  go on with the changed keys: --accept; or start a new run beside it: --fresh"
    )
    assert len(take(storage, changed, accept=True).differences) == 2
    assert take(storage, changed).resumed


def test_another_seed_under_the_same_name_is_refused_with_the_ways_out(storage: Storage) -> None:
    started = take(storage)
    other = recipe(run={"name": "small", "seed": 2}, duration={"steps": 7})
    with pytest.raises(RunError) as caught:
        take(storage, other, accept=True)
    assert str(caught.value) == (
        f"{started.run.folder}: the run 'small' learns something else:\n"
        "  run.seed: 1 -> 2 (weights and the order of rows are drawn from it)\n"
        "  give this one another name: run.name=...; or start a new run of the same name beside it: --fresh"
    )
    fresh = take(storage, other, fresh=True)
    assert take(storage, other).run == fresh.run
    assert take(storage).run == started.run  # the old command still means the old run


def test_other_data_under_the_same_recipe_is_refused(storage: Storage) -> None:
    take(storage)
    with pytest.raises(RunError, match="the content of the data has changed"):
        take(storage, store="4567")


def test_a_name_that_begins_like_another_is_another_run(storage: Storage) -> None:
    take(storage, recipe(run={"name": "small-b", "seed": 2}))
    assert not take(storage).resumed


def test_a_run_that_was_killed_before_it_was_written_down_is_started_again(storage: Storage) -> None:
    run, _ = choose(storage, recipe(), STORE, fresh=False)
    with run_lock.hold(storage, run.folder):
        pass  # the process dies here
    assert stored_runs(storage) == []
    assert take(storage).run == run


def test_a_torn_run_file_is_named(storage: Storage) -> None:
    storage.write("runs/odd/run.json", b"{")
    with pytest.raises(IntegrityError, match=r"runs/odd/run.json: this is no run"):
        stored_runs(storage)
    assert not take(storage).resumed


# --- what is known of a run -------------------------------------------------------------------------------------------


def write_events(storage: Storage, folder: str, *kinds: Any) -> None:
    log = EventLog(storage, folder)
    for step, kind in enumerate(kinds):
        log.write(StepRecord(kind=kind, attempt="a", time=0.0, step=step, steps=9))
    log.close()


def test_status_follows_the_lock_and_the_last_record(storage: Storage) -> None:
    with claim(storage, recipe(), STORE, fresh=False, accept=False) as taken:
        stored = find_run(storage, "small")
        running = status(storage, stored)
        assert (running.state, running.last) == ("running", None)
        assert running.owner.startswith(f"pid {os.getpid()} on ")
    assert status(storage, stored).state == "stopped"
    write_events(storage, taken.run.folder, "start", "step")
    assert status(storage, stored).state == "stopped"
    write_events(storage, taken.run.folder, "start", "end")
    finished = status(storage, stored)
    assert finished.state == "finished"
    assert finished.last is not None
    assert finished.last.kind == "end"


def test_find_run_by_folder_or_by_name(storage: Storage) -> None:
    first, second = take(storage), take(storage, fresh=True)
    assert find_run(storage, "small").ref == second.run
    assert find_run(storage, first.run.folder).ref == first.run
    assert find_run(storage, first.run.folder.removeprefix("runs/") + "/").ref == first.run
    with pytest.raises(RunError, match="no run 'smal'.*\n  did you mean small?"):
        find_run(storage, "smal")


# --- one writer -------------------------------------------------------------------------------------------------------

FOLDER = "runs/small"


def owner(storage: Storage) -> run_lock.Owner:
    folder = Path(storage.root, FOLDER, run_lock.FOLDER)
    return run_lock.Owner.from_dict(json.loads(max(folder.iterdir()).read_bytes()))


def plant(storage: Storage, number: int = 1, **changes: Any) -> None:
    """A lock that another process might have left."""
    left = replace(run_lock._myself(), token="another", **changes)
    storage.write_json(f"{FOLDER}/lock/{number:08d}.json", left.to_dict())


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_live_owner_keeps_others_out_with_its_pid_and_host(storage: Storage) -> None:
    with (
        run_lock.hold(storage, FOLDER),
        pytest.raises(RunError, match=rf"^runs/small: the run is in use by pid {os.getpid()} on \S+\n"),
        run_lock.hold(storage, FOLDER),
    ):
        pass
    with run_lock.hold(storage, FOLDER) as before:
        assert before is None  # released, not abandoned
    assert [path.name for path in Path(storage.root, FOLDER, "lock").iterdir()] == ["00000002.json"]
    assert run_lock.holder(storage, FOLDER) is None


def test_a_dead_owner_on_this_machine_is_taken_over_at_once(storage: Storage, dead_pid: int) -> None:
    plant(storage, pid=dead_pid)
    with run_lock.hold(storage, FOLDER) as before:
        assert before is not None
        assert before.pid == dead_pid
        assert owner(storage).pid == os.getpid()


def test_a_pid_that_was_given_to_another_process_is_dead(storage: Storage) -> None:
    plant(storage, pid=os.getppid(), started=1.0)
    with run_lock.hold(storage, FOLDER) as before:
        assert before is not None


def test_another_machine_is_believed_for_a_minute(storage: Storage, dead_pid: int) -> None:
    plant(storage, machine="other", host="other", pid=dead_pid, heartbeat=time.time() - 50)
    message = r"in use by pid \d+ on other, seen 5\d s ago; if it is dead, the run is free 60 s after that"
    with pytest.raises(RunError, match=message), run_lock.hold(storage, FOLDER):
        pass
    plant(storage, machine="other", heartbeat=time.time() - 61)
    with run_lock.hold(storage, FOLDER) as before:
        assert before is not None


def test_a_lock_whose_writer_was_killed_half_way_is_taken_over(storage: Storage) -> None:
    storage.write(f"{FOLDER}/lock/00000001.json", b'{"pid"')
    with run_lock.hold(storage, FOLDER):
        assert owner(storage).pid == os.getpid()


def test_an_older_number_that_came_free_is_not_the_lock(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that looked long ago finds number 2 free again, while the lock has gone on to number 5."""
    plant(storage, number=5)
    seen = iter([(1, None)])
    newest = run_lock._newest
    monkeypatch.setattr(run_lock, "_newest", lambda *where: next(seen, None) or newest(*where))
    with pytest.raises(RunError, match="in use"), run_lock.hold(storage, FOLDER):
        pass
    assert [path.name for path in Path(storage.root, FOLDER, "lock").iterdir()] == ["00000005.json"]


def test_the_owner_renews_its_lock(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.02)
    with run_lock.hold(storage, FOLDER):
        first = owner(storage).heartbeat
        for _ in range(500):
            if owner(storage).heartbeat > first:
                break
            time.sleep(0.01)
        assert owner(storage).heartbeat > first


def test_an_owner_that_lost_its_lock_is_interrupted(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.02)
    with pytest.raises(RunError, match=r"taken over by pid \d+ on thief"), run_lock.hold(storage, FOLDER):
        plant(storage, number=2, host="thief")
        time.sleep(10)
    assert owner(storage).host == "thief"
    assert not owner(storage).released


RACER = """
import sys, time
from pathlib import Path
from outgrow.cluster import run_lock
from outgrow.errors import RunError
from outgrow.storage import Storage
root, name, racers = sys.argv[1], sys.argv[2], int(sys.argv[3])
storage = Storage(root)
Path(root, f"ready-{name}").touch()
for round in range(20):
    while not Path(root, f"go-{round}").exists():
        pass
    try:
        with run_lock.hold(storage, f"runs/race-{round}"):
            Path(root, f"won-{round}-{name}").touch()
            while len(list(Path(root).glob(f"*-{round}-*"))) < racers:
                time.sleep(0.001)  # hold on until every other has been refused
    except RunError:
        Path(root, f"lost-{round}-{name}").touch()
"""


@pytest.fixture
def racers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    started = [subprocess.Popen([*command, str(n), "3"]) for n in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_of_three_processes_that_race_for_a_dead_owners_lock_one_wins(
    storage: Storage, tmp_path: Path, racers: list[subprocess.Popen[bytes]], dead_pid: int
) -> None:
    plant(storage, pid=dead_pid)
    stale = Path(storage.root, FOLDER, "lock/00000001.json").read_bytes()
    for round_ in range(20):
        storage.write(f"runs/race-{round_}/lock/00000007.json", stale)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    for round_ in range(20):
        (tmp_path / f"go-{round_}").touch()
        wait_for(lambda n=round_: len([*tmp_path.glob(f"won-{n}-*"), *tmp_path.glob(f"lost-{n}-*")]) == 3)
        assert len(list(tmp_path.glob(f"won-{round_}-*"))) == 1
    assert [process.wait(timeout=30) for process in racers] == [0, 0, 0]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lock_in_a_bucket_keeps_others_out_too() -> None:
    bucket = Storage("memory://locks")
    with run_lock.hold(bucket, FOLDER), pytest.raises(RunError, match="in use by pid"), run_lock.hold(bucket, FOLDER):
        pass
    with run_lock.hold(bucket, FOLDER) as before:
        assert before is None


# --- on the command line ----------------------------------------------------------------------------------------------


def test_runs_list_and_show(storage: Storage, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from outgrow.cli.runs import app

    site = tmp_path / "site.yaml"
    site.write_text(f"schema: 1\nstorage: {storage.root}\n")
    outgrow = CliRunner()
    nothing = outgrow.invoke(app, ["list", "--site", str(site)])
    assert nothing.stdout == f"no runs in {storage.root}\n"
    run = take(storage).run
    log = EventLog(storage, run.folder)
    common: dict[str, Any] = {"attempt": "a", "time": 0.0, "steps": 1200}
    log.write(StepRecord(kind="step", step=1100, loss=2.34567, tokens_per_s=1234.5, **common))
    log.write(StepRecord(kind="validation", step=1150, loss=2.5, detail={"a": 2.5}, **common))
    log.close()

    listed = outgrow.invoke(app, ["list", "--site", str(site)]).stdout.splitlines()
    assert listed[0].split() == ["run", "state", "step", "loss", "validation", "started"]
    assert listed[1].split()[:-2] == [run.folder.removeprefix("runs/"), "stopped", "1,150/1,200", "2.3457", "2.5000"]
    shown = outgrow.invoke(app, ["show", "small", "--site", str(site)]).stdout
    assert f"folder      {storage.root}/{run.folder}\n" in shown
    assert "model       architecture llama\n" in shown
    assert "speed       1,234 tokens/s\n" in shown
    assert 'last record validation at 1970-01-01T00:00:00+00:00\n            {"a": 2.5}\n' in shown
    with pytest.raises(RunError, match="did you mean small"):
        outgrow.invoke(app, ["show", "smal", "--site", str(site)], catch_exceptions=False)
