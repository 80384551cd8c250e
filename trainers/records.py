"""Says what happens in a run: to its ``events.jsonl``, to trackers, and to whoever watches. Never on the step's time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from outgrow.contracts import Context, EventKind, StepRecord
from outgrow.monitoring.events import EventLog
from outgrow.monitoring.trackers import OpenTracker, Tracking
from outgrow.storage import Storage
from outgrow.trainers.progress import Progress

log = logging.getLogger(__name__)


class Records:
    """The voice of rank 0; the other ranks are silent.

    What is said is queued: a thread writes it, and hands it to ``context.report`` and to the trackers. Each tracker has a
    thread of its own, where it is opened too.
    """

    def __init__(
        self,
        context: Context,
        storage: Storage,
        run_folder: str,
        steps: int,
        trackers: Mapping[str, OpenTracker] | None = None,
    ) -> None:
        self._attempt = context.attempt
        self._steps = steps
        self._log: EventLog | None = None
        if context.rank == 0:
            self._log = EventLog(storage, run_folder, [context.report, self._tell_trackers])
            self._tracking = Tracking(trackers or {}, self._tracker_is_gone)

    @property
    def dropped(self) -> int:
        """Records that ``events.jsonl`` could not take."""
        return self._log.dropped if self._log is not None else 0

    def say(self, kind: EventKind, progress: Progress, **values: Any) -> None:
        """One record; ``values`` are the fields of ``StepRecord`` that belong to its kind. Nobody may change them later."""
        if self._log is None:
            return
        self._log.write(
            StepRecord(
                kind=kind,
                attempt=self._attempt,
                time=time.time(),
                step=progress.step,
                steps=self._steps,
                epoch=progress.epoch,
                tokens=progress.tokens,
                **values,
            )
        )

    def close(self) -> None:
        """Wait until what was said is written, or the storage and the trackers have been waited for long enough."""
        if self._log is not None:
            self._log.flush()
            self._tracking.close()
            self._log.close()

    def _tell_trackers(self, record: StepRecord) -> None:
        self._tracking.tell(record)

    def _tracker_is_gone(self, name: str, why: str) -> None:
        """Said once: training goes on, and all of it can be rebuilt from the file."""
        log.warning("%s is not told of the run any more: %s", name, why)
        if self._log is not None:
            self._log.note(tracker=name, error=why)
