"""The state of a run, word by word, and the account of wall time under random histories of a real recorder."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_runs import attempt_facts
from recorded_ranks import started

from outgrow.monitoring.agent import scan as scanning
from outgrow.monitoring.agent.run_state import judge, said
from outgrow.monitoring.agent.scan import RankView
from outgrow.monitoring.agent.wall import WallAccount, wall_seconds
from outgrow.monitoring.recording import recorder as recording
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.recording.recorder import Before, Recorder
from outgrow.monitoring.recording.slots import SLOTS, STATES, WALL
from outgrow.recipes.schema.site import Site

NOW, CLOCK = 1_000_000.0, 500.0


def rank(number: int, word: str, *, alive: bool = True, open_s: float = 0.1, stepping: bool = True, **slots: float) -> RankView:
    record = dict.fromkeys(SLOTS, math.nan)
    record |= {"state": STATES.index(word), "touched": NOW - open_s, "open_since": CLOCK - open_s, "stall_threshold": 60.0}  # type: ignore[arg-type]
    record |= {"stepping": float(stepping), **slots}
    return RankView(rank=number, record=record, alive=alive, read_at=CLOCK)


def state(*ranks: RankView, local: tuple[int, ...] | None = None) -> str:
    facts = attempt_facts(local_ranks=local or tuple(one.rank for one in ranks))
    return judge(facts, {one.rank: one for one in ranks}, NOW)


DEAD: dict[str, Any] = {"alive": False}


@pytest.mark.parametrize(
    ("wanted", "ranks"),
    [
        ("starting", [rank(0, "starting", stepping=False)]),
        ("running", [rank(0, "running"), rank(1, "running")]),
        ("running", [rank(0, "running"), rank(1, "starting", stepping=False)]),
        # Gone without a word: rank 0, another, or all of them.
        ("lost", [rank(0, "running", **DEAD), rank(1, "running")]),
        ("lost", [rank(0, "running"), rank(1, "running", **DEAD)]),
        ("lost", [rank(0, "starting", stepping=False, **DEAD)]),
        ("lost", [rank(1, "running", **DEAD)]),
        # The last word of rank 0 holds, whatever became of the others.
        ("finished", [rank(0, "finished", **DEAD), rank(1, "running", **DEAD)]),
        ("failed", [rank(0, "failed", **DEAD), rank(1, "running", **DEAD)]),
        ("interrupted", [rank(0, "interrupted"), rank(1, "running")]),
        ("running", [rank(0, "running"), rank(1, "finished", **DEAD)]),
        # Stuck: any living rank, in a step beyond the threshold, between steps beyond ten minutes.
        ("running", [rank(0, "running", open_s=59)]),
        ("stalled", [rank(0, "running", open_s=61)]),
        ("stalled", [rank(0, "running"), rank(1, "running", open_s=61)]),
        ("running", [rank(0, "running", open_s=61, stall_threshold=90)]),
        ("running", [rank(0, "running", open_s=599, stepping=False)]),
        ("stalled", [rank(0, "running", open_s=601, stepping=False)]),
        ("running", [rank(0, "running", open_s=601, stepping=False, stall_threshold=700)]),
        ("stalled", [rank(0, "starting", open_s=601, stepping=False)]),
        ("lost", [rank(0, "running", open_s=61), rank(1, "running", open_s=61, **DEAD)]),
        ("running", [rank(0, "running"), rank(1, "finished", open_s=700)]),
        # Asked to be started again, and not for ever.
        ("restarting", [rank(0, "restarting", **DEAD), rank(1, "running", **DEAD)]),
        ("lost", [rank(0, "restarting", open_s=601, **DEAD)]),
        # A node without rank 0.
        ("running", [rank(2, "running"), rank(3, "running")]),
        ("stalled", [rank(2, "running"), rank(3, "running", open_s=61)]),
        ("finished", [rank(2, "finished", **DEAD), rank(3, "finished")]),
        ("failed", [rank(2, "finished", **DEAD), rank(3, "failed", **DEAD)]),
        ("running", [rank(2, "finished", **DEAD), rank(3, "running")]),
        ("lost", [rank(2, "finished", **DEAD), rank(3, "running", **DEAD)]),
    ],
)
def test_state(wanted: str, ranks: list[RankView]) -> None:
    assert state(*ranks) == wanted


def test_a_rank_that_has_no_record_yet_is_not_lost() -> None:
    assert state(rank(0, "starting", stepping=False), local=(0, 1)) == "starting"
    assert state(local=(0, 1)) == "starting"
    assert state(rank(1, "running"), local=(0, 1)) == "running"


def test_a_record_without_a_word_is_of_a_rank_that_starts() -> None:
    assert said({"state": math.nan}) == "starting"
    assert said({"state": 99.0}) == "starting"


# --- wall seconds -----------------------------------------------------------------------------------------------------


class Clock:
    """Both clocks of a machine, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def module(self) -> SimpleNamespace:
        return SimpleNamespace(time=lambda: NOW + self.now, monotonic=lambda: CLOCK + self.now, time_ns=time.time_ns)


class History:
    """One run with its deaths and starts, told by a real recorder, and scraped at random times."""

    def __init__(self, seed: int, node: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random, self.node, self.clock = random.Random(seed), node, clock
        self.alive, self.steps, self.starts = True, 0, 0
        self.account = WallAccount()
        self.shown: dict[str, float] = {}
        monkeypatch.setattr(recording, "time", clock.module())
        monkeypatch.setattr(scanning, "time", clock.module())
        monkeypatch.setattr(scanning, "is_alive", lambda record: self.alive)
        self.start()

    def start(self) -> None:
        launched = NOW + self.clock.now
        self.wait(3)
        self.starts += 1
        folder = started(self.node, "run", attempt=str(self.starts), when=NOW + self.clock.now + self.starts / 100)
        before = Before.of_records(folder.parent, 0)
        # Started again by the same command, or by a new one.
        self.first_launch = launched if self.starts == 1 or self.random.random() < 0.5 else self.first_launch
        self.recorder = Recorder(folder, 0, launched=self.first_launch, before=before, stall_after_s=5)
        self.alive, self.stepping = True, False
        self.steps = max(0, self.steps - 3)

    def wait(self, most_s: float) -> None:
        """Time passes, and is looked at now and then."""
        for _ in range(self.random.randrange(4)):
            self.clock.now += self.random.random() * most_s
            if self.starts:
                self.scrape()

    def scrape(self) -> None:
        [run] = scanning.Scanner(self.node / "records").scan()
        seconds = self.account.show(wall_seconds(run.ranks[0]))
        for kind, value in seconds.items():
            assert value >= self.shown.get(kind, 0.0), f"{kind} fell from {self.shown[kind]} to {value}"
        self.shown = dict(seconds)
        assert sum(seconds.values()) <= self.clock.now + 1e-6

    def act(self) -> None:
        what = self.random.random()
        if what < 0.05:
            self.alive = False  # in the middle of whatever it was
            self.wait(20)
            self.start()
        elif what < 0.2:
            self.recorder.enter(self.random.choice(WALL))
            self.stepping = False
            self.wait(30)
        elif not self.stepping:
            self.recorder.enter_steps()
            self.stepping = True
        else:
            begun = self.clock.now
            self.wait(20 if what > 0.9 else 0.5)
            if what < 0.8:  # else it is known some steps later, as on a device
                took = self.clock.now - begun
                self.recorder.times({"data_wait": took * self.random.random()}, took)
            self.steps += 1
            self.recorder.step(step=self.steps, epoch=0, tokens=1, padding=0, samples=1, flops=0.0)


@pytest.mark.parametrize("seed", range(12))
def test_wall_seconds_never_fall_and_add_up(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    site = Site.model_validate({"schema": 1, "storage": str(tmp_path), "monitoring": {"folder": str(tmp_path / "m")}})
    history = History(seed, node_folder(site), clock, monkeypatch)
    for _ in range(150):
        history.act()
    history.recorder.enter("checkpoint")
    clock.now += 1.0
    history.recorder.close("finished")
    history.scrape()
    assert sum(history.shown.values()) == pytest.approx(clock.now, rel=1e-9)


def test_the_open_interval_of_a_step_counts_only_beyond_the_threshold() -> None:
    walls = {f"wall_s.{kind}": 10.0 for kind in WALL}
    stepping = rank(0, "running", open_s=70, open_kind=WALL.index("productive"), **walls)
    assert wall_seconds(stepping) == {**dict.fromkeys(WALL, 10.0), "stalled": pytest.approx(20.0)}
    saving = rank(0, "running", open_s=70, stepping=False, open_kind=WALL.index("checkpoint"), **walls)
    assert wall_seconds(saving) == {**dict.fromkeys(WALL, 10.0), "checkpoint": pytest.approx(80.0)}
    gone = rank(0, "running", alive=False, open_s=70, stepping=False, open_kind=WALL.index("checkpoint"), **walls)
    assert wall_seconds(gone) == dict.fromkeys(WALL, 10.0)


def test_what_was_shown_too_early_is_taken_off_where_it_turns_up() -> None:
    account = WallAccount()
    zero = dict.fromkeys(WALL, 0.0)
    account.show({**zero, "productive": 100.0, "checkpoint": 30.0})
    # Killed in the checkpoint, which nobody has credited.
    assert account.show({**zero, "productive": 100.0})["checkpoint"] == 30.0
    # The next start books the 30 seconds, and ten more, as init.
    shown = account.show({**zero, "productive": 100.0, "init": 40.0})
    assert (shown["checkpoint"], shown["init"], sum(shown.values())) == (30.0, 10.0, 140.0)
    shown = account.show({**zero, "productive": 200.0, "init": 40.0, "checkpoint": 5.0})
    assert (shown["checkpoint"], shown["init"], sum(shown.values())) == (35.0, 10.0, 245.0)
