"""The record of a run: order, torn lines, restarts, a full disk, a bucket."""

from __future__ import annotations

import resource
import signal
import time
import uuid
from pathlib import Path

import pytest

from outgrow.contracts import StepRecord
from outgrow.monitoring import events
from outgrow.monitoring.events import EventLog, read_events
from outgrow.monitoring.live import describe, duration
from outgrow.storage import Storage


def record(step: int, **changes: object) -> StepRecord:
    values: dict[str, object] = {"kind": "step", "attempt": "a", "time": 1.5, "step": step, "steps": 9}
    return StepRecord.from_dict(values | changes)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_records_come_back_in_order_over_two_starts(tmp_path: Path, kind: str) -> None:
    storage = Storage(str(tmp_path) if kind == "local" else f"memory://{uuid.uuid4().hex}")
    storage.write("runs/r/run.json", b"{}")
    for attempt in ("a", "b"):
        log = EventLog(storage, "runs/r")
        for step in range(200):
            log.write(record(step, attempt=attempt, loss=0.1 * step))
        log.close()
    read = list(read_events(storage, "runs/r"))
    assert [(r.attempt, r.step) for r in read] == [(a, s) for a in "ab" for s in range(200)]
    assert read[7] == record(7, loss=0.1 * 7)


def test_half_a_line_of_a_killed_process_costs_no_other_record(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("r/events.jsonl", b'{"kind":"step","att')
    log = EventLog(storage, "r")
    log.write(record(3))
    log.close()
    assert [r.step for r in read_events(storage, "r")] == [3]


def test_write_returns_at_once_and_nothing_is_lost_while_the_folder_is_away(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    log = EventLog(storage, "later")
    started = time.thread_time()
    for step in range(50):
        log.write(record(step))
    assert time.thread_time() - started < 0.5
    time.sleep(0.2)
    (tmp_path / "later").mkdir()
    log.close()
    assert [r.step for r in read_events(storage, "later")] == list(range(50))


def test_a_storage_that_never_answers_does_not_hold_the_run(tmp_path: Path) -> None:
    log = EventLog(Storage(str(tmp_path)), "never")
    log.write(record(1))
    started = time.monotonic()
    log.close(timeout_s=3.0)
    assert time.monotonic() - started < 10


def test_a_disk_that_fills_half_way_through_a_line_costs_no_record(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("r/run.json", b"{}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = EventLog(storage, "r")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        for step in range(20):
            log.write(record(step))
        time.sleep(0.5)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [r.step for r in read_events(storage, "r")] == list(range(20))


def test_whatever_a_store_raises_the_log_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    write, failures = storage.write, [RuntimeError("no endpoint"), RuntimeError("no credentials")]

    def fails_twice(key: str, data: bytes) -> None:
        if failures:
            raise failures.pop()
        write(key, data)

    monkeypatch.setattr(storage, "write", fails_twice)
    monkeypatch.setattr(events, "UPLOAD_INTERVAL_S", 0.01)
    log = EventLog(storage, "r")
    for step in range(5):
        log.write(record(step))
        time.sleep(0.1)
    log.close()
    assert [r.step for r in read_events(storage, "r")] == list(range(5))


def test_a_line_for_a_person() -> None:
    line = describe(record(4, loss=2.5, learning_rate=1e-3, tokens_per_s=1234.6, step_s=2.0, data_wait_s=0.01))
    assert line == "step 4/9  loss 2.5000  lr 1.00e-03  1,235 tokens/s  data wait 0.5%  ETA 10s"
    assert describe(record(4, kind="validation", loss=2.0, detail={"streams": {"a": 1.0, "b": 3.0}})) == (
        "step 4/9  validation loss 2.0000  (a 1.0000, b 3.0000)"
    )
    assert [duration(s) for s in (7, 185, 3720)] == ["7s", "3m05s", "1h02m"]
