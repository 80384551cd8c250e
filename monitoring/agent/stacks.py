"""What the ranks of a stalled run are doing: their Python stacks, taken from outside, so of a stopped process too."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from outgrow.monitoring.agent.run_state import ENDED, said
from outgrow.monitoring.agent.scan import RunView

log = logging.getLogger(__name__)

FOLDER = "stalls"
KEPT = 20
"""Dumps of a run."""
TIMEOUT_S = 15.0

_AT_ONCE = 4


class StallStacks:
    """Dumps the stacks of every local rank once for each stall, into ``<folder>/<run>/<time>-agent/``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stalled: set[Path] = set()

    def watch(self, runs: Sequence[RunView]) -> None:
        """To be told the runs again and again; the work is done in a thread."""
        stalled = {run.folder: run for run in runs if run.state == "stalled"}
        for attempt, run in stalled.items():
            if attempt not in self._stalled:
                pids = {
                    rank.rank: int(rank.record["pid"])
                    for rank in run.ranks.values()
                    if rank.alive and said(rank.record) not in ENDED
                }
                log.warning("%s is stalled", run.facts.run)
                threading.Thread(target=self._dump, args=(run.facts.run, pids), name="stacks", daemon=True).start()
        self._stalled = set(stalled)

    def _dump(self, run: str, pids: Mapping[int, int]) -> None:
        try:
            log.warning("stacks of %s are in %s", run, dump(self._folder / run, pids))
        except OSError as error:
            log.warning("stacks of %s could not be written: %s", run, error)


def dump(folder: Path, pids: Mapping[int, int]) -> Path:
    """A new folder below ``folder`` with the stacks of processes by rank; the oldest beyond ``KEPT`` go. Raises ``OSError``."""
    made = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-agent"
    made.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rank, text in zip(pids, pool.map(stack, pids.values()), strict=True):
            (made / f"rank-{rank:05d}.txt").write_text(text)
    for old in sorted(path for path in folder.glob("*-agent") if path.is_dir() and not path.is_symlink())[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return made


def stack(pid: int) -> str:
    """The stacks of all threads of a process, for people; or why they cannot be read."""
    program = shutil.which("py-spy", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if program is None:
        return "py-spy is not installed beside outgrow; pip install py-spy\n"
    # Not paused while it is read: pausing needs more rights, and waits for a process that is stopped already.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy could not read process {pid}: {error}\n"
    if done.returncode == 0:
        return done.stdout.decode(errors="replace")
    hint = "allow it with: sysctl kernel.yama.ptrace_scope=0" if b"ermission" in done.stderr else ""
    return f"py-spy could not read process {pid}:\n{done.stderr.decode(errors='replace')}{hint}\n"
