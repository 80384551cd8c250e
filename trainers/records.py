"""Says what happens in a run: to its ``events.jsonl`` and to whoever watches. Never on the step's time."""

from __future__ import annotations

import time
from typing import Any, Literal

from outgrow.contracts import Context, StepRecord
from outgrow.monitoring.events import EventLog
from outgrow.storage import Storage
from outgrow.trainers.progress import Progress


class Records:
    """The voice of rank 0; the other ranks are silent."""

    def __init__(self, context: Context, storage: Storage, run_folder: str, steps: int) -> None:
        self._context = context
        self._steps = steps
        self._log = EventLog(storage, run_folder) if context.rank == 0 else None

    def say(self, kind: Literal["start", "step", "validation", "checkpoint", "end"], progress: Progress, **values: Any) -> None:
        """One record; ``values`` are the fields of ``StepRecord`` that belong to its kind."""
        if self._log is None:
            return
        record = StepRecord(
            kind=kind,
            attempt=self._context.attempt,
            time=time.time(),
            step=progress.step,
            steps=self._steps,
            epoch=progress.epoch,
            tokens=progress.tokens,
            **values,
        )
        self._log.write(record)
        self._context.report(record)

    def close(self) -> None:
        """Wait until what was said is written."""
        if self._log is not None:
            self._log.close()
