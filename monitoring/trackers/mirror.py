"""A tracker that can write to a local folder alone, for a run whose storage is a bucket."""

from __future__ import annotations

import os
from pathlib import Path

from outgrow.contracts import StepRecord
from outgrow.monitoring.trackers.tracking import Tracker
from outgrow.storage import Storage


class Mirrored:
    """``tracker``, which writes into ``folder``; that is put to ``key`` when it is closed."""

    def __init__(self, tracker: Tracker, storage: Storage, key: str, folder: Path) -> None:
        self._tracker, self._storage, self._key, self._folder = tracker, storage, key, folder

    def record(self, record: StepRecord) -> None:
        self._tracker.record(record)

    def close(self) -> None:
        self._tracker.close()
        for root, _, names in os.walk(self._folder):
            for name in names:
                path = Path(root, name)
                if path.is_file() and not path.is_symlink():
                    self._storage.upload(path, f"{self._key}/{path.relative_to(self._folder).as_posix()}")


def bring(storage: Storage, key: str, folder: Path) -> None:
    """Every file below ``key`` into ``folder``."""
    files = storage.sizes(key)
    for name in storage.names(key):
        if name in files:
            storage.download(f"{key}/{name}", folder / name)
        else:
            bring(storage, f"{key}/{name}", folder / name)
