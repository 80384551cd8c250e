"""Ranks that record themselves as those of a run do, without the run: in this process, or as real ones that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent_runs import attempt_facts

from outgrow.monitoring.recording.attempt import attempt_folder, write_facts
from outgrow.monitoring.recording.recorder import Before, Recorder
from outgrow.recipes.schema.site import Site

STEP_S = 0.05


def site_at(folder: Path, port: int, **monitoring: Any) -> Site:
    """A site whose every folder is below ``folder``."""
    own = {"folder": str(folder / "monitoring"), "agent_port": port, "idle_s": 60.0, "stall_after_s": 1.0, **monitoring}
    return Site.model_validate(
        {"schema": 1, "storage": str(folder / "storage"), "cache": str(folder / "cache"), "monitoring": own}
    )


def started(node: Path, run: str, ranks: Sequence[int] = (0,), *, attempt: str = "a", when: float = 0, **facts: Any) -> Path:
    """The folder of a new start of a run, its facts in it."""
    when = when or time.time()
    folder = attempt_folder(node, run, when, attempt)
    given = {"local_ranks": tuple(ranks), "world": len(ranks), "host": node.name, "stall_after_s": 1.0, **facts}
    write_facts(folder, attempt_facts(run=run, name=run, attempt=attempt, started=when, **given))
    return folder


def recorder(folder: Path, rank: int = 0, *, stall_after_s: float = 1.0, launched: float = 0) -> Recorder:
    """Goes on from earlier starts."""
    before = Before.of_records(folder.parent, rank)
    return Recorder(folder, rank, launched=launched or time.time(), before=before, stall_after_s=stall_after_s)


def make_step(record: Recorder, step: int, step_s: float = STEP_S) -> None:
    record.times({"forward": step_s * 0.4, "backward": step_s * 0.5, "data_wait": 0.0}, step_s)
    record.step(step=step, epoch=0, tokens=100, padding=28, samples=4, flops=60_000.0)


def start_rank(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    """A process that makes steps until it is ended."""
    return subprocess.Popen([sys.executable, __file__, json.dumps([str(folder), rank])])


def train_forever(folder: str, rank: int) -> None:
    record = recorder(Path(folder), rank)
    record.enter_steps()
    step = 0
    while True:
        time.sleep(STEP_S)
        step += 1
        make_step(record, step)


if __name__ == "__main__":
    train_forever(*json.loads(sys.argv[1]))
