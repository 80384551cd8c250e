"""Which records of a node are removed: old starts of a run, and runs that nobody has touched for long. Only our own files.

So are the stacks of old stalls.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from outgrow.monitoring.recording.rank_file import read_record
from outgrow.monitoring.recording.recorder import is_alive

STARTS_KEPT = 5
KEPT_S = 30 * 86_400.0

_ATTEMPT = re.compile(r"[0-9]{15}-.+", re.ASCII)
_FILES = re.compile(r"attempt\.json(\.[0-9]+)?|rank-[0-9]{5}\.(rec|[0-9]+)", re.ASCII)
"""What is written into the folder of a start, and what a kill leaves of writing it."""


def prune(records: Path, now: float) -> None:
    """Keep the newest ``STARTS_KEPT`` starts of each run, and none of a run untouched for ``KEPT_S`` before Unix time ``now``.

    Starts with a living rank stay. A folder that holds anything else stays with that. Links are not followed.
    """
    for run in _folders(records):
        starts = sorted((one for one in _folders(run) if _ATTEMPT.fullmatch(one.name)), reverse=True)
        is_old = all(now - _touched(one) > KEPT_S for one in (run, *starts))
        for start in starts[0 if is_old else STARTS_KEPT :]:
            _remove(start)
        if is_old:
            with contextlib.suppress(OSError):  # not empty
                run.rmdir()


def prune_stalls(stalls: Path, now: float) -> None:
    """Keep what was written of a run's stalls until ``KEPT_S`` after the last. Links are not followed."""
    for run in _folders(stalls):
        with contextlib.suppress(OSError):
            if now - run.stat().st_mtime > KEPT_S:
                shutil.rmtree(run, ignore_errors=True)


def _remove(start: Path) -> None:
    names = sorted(os.listdir(start)) if not start.is_symlink() else []
    records = (read_record(start / name) for name in names if name.endswith(".rec"))
    if any(is_alive(record) for record in records if record is not None):
        return
    for name in names:
        path = start / name
        if _FILES.fullmatch(name) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        start.rmdir()


def _touched(folder: Path) -> float:
    """Unix time of the last change that the system or a record knows of; stores into a mapped file may leave no mark on it."""
    found = [0.0]
    with contextlib.suppress(OSError):
        found.append(folder.stat().st_mtime)
        records = (read_record(path) for path in folder.glob("rank-*.rec"))
        found += [record["touched"] for record in records if record is not None and record["touched"] > 0]
    return max(found)


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
