"""A tracker's files made anew from ``events.jsonl``."""

from __future__ import annotations

import shutil
from pathlib import Path

from outgrow.contracts import JsonDict
from outgrow.monitoring.events import read_events
from outgrow.monitoring.trackers.choice import open_trackers
from outgrow.monitoring.trackers.points import furthest_kept, last_trained
from outgrow.storage import Storage


def rebuild(name: str, recipe: JsonDict, storage: Storage, run_folder: str, node: Path) -> int:
    """How many records the tracker ``name`` was told, after what it had of the run is gone. The run must not be going on.

    Of steps that were trained again, the last time alone counts. Killed half-way, it is called again.
    """
    storage.remove(f"{run_folder}/{name}")
    shutil.rmtree(node / "trackers" / Path(run_folder).name / name, ignore_errors=True)
    tracker = open_trackers([name], recipe, storage, run_folder, node)[name]()
    kept = furthest_kept(read_events(storage, run_folder))
    told = 0
    for record in last_trained(read_events(storage, run_folder), kept):
        tracker.record(record)
        told += 1
    tracker.close()
    return told
