"""The end of a run's ``events.jsonl``, followed as it grows: each look reads what is new, from the newest line back."""

from __future__ import annotations

from collections import deque
from itertools import takewhile

from outgrow.contracts import JsonDict, StepRecord
from outgrow.monitoring.event_files import newest_lines
from outgrow.storage import Storage

FIRST_LINES = 2_000
"""So far back is looked at first."""
KEPT_EVENTS = 8
KEPT_STEPS = 100


class Tail:
    """The newest record of each kind, the last logged steps, and the last of all other records."""

    def __init__(self, storage: Storage, run_folder: str) -> None:
        self._storage, self._folder = storage, run_folder
        self._seen: JsonDict | None = None
        self.newest: dict[str, StepRecord] = {}
        self.last: StepRecord | None = None
        self.steps: deque[StepRecord] = deque(maxlen=KEPT_STEPS)
        self.events: deque[StepRecord] = deque(maxlen=KEPT_EVENTS)

    def look(self) -> None:
        """Take what has been written since the last look. Raises what the storage raises."""
        lines = takewhile(lambda line: line != self._seen, newest_lines(self._storage, self._folder))
        new = [line for line, _ in zip(lines, range(FIRST_LINES), strict=False)]
        records = [line for line in new if "kind" in line]
        if records:
            self._seen = records[0]
        for line in reversed(records):
            self._take(StepRecord.from_dict(line))

    def _take(self, record: StepRecord) -> None:
        self.newest[record.kind] = self.last = record
        if record.kind == "step":
            self.steps.append(record)
        else:
            self.events.append(record)
        if record.kind == "start":
            self.steps.clear()  # another start, another pace
