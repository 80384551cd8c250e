"""The record of a run: order, torn lines, restarts, a full disk, a bucket."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from full_disk import files_limited_to

from outgrow.contracts import StepRecord
from outgrow.monitoring import event_files, events
from outgrow.monitoring.event_files import (
    ObjectSink,
    has_lines,
    line_of,
    newest_lines,
    next_to_thin,
    read_lines,
    thinned,
)
from outgrow.monitoring.events import EventLog, newest_counters, read_events
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
    log = EventLog(storage, "r")
    with files_limited_to(1000):
        for step in range(20):
            log.write(record(step))
        time.sleep(0.5)
    log.close()
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


def test_a_record_costs_the_loop_some_microseconds(tmp_path: Path) -> None:
    log = EventLog(Storage(str(tmp_path)), "later")
    said = [record(step, detail={"counters": {f"counter.{number}": number / 7 for number in range(80)}}) for step in range(200)]
    best = 1.0
    for _ in range(5):
        started = time.thread_time()
        for each in said:
            log.write(each)
        best = min(best, (time.thread_time() - started) / len(said))
    log.close(timeout_s=0.1)
    assert best < 15e-6


# --- observers --------------------------------------------------------------------------------------------------------


def test_observers_hear_all_in_order_in_another_thread_and_one_that_raises_is_dropped(tmp_path: Path) -> None:
    storage, heard = Storage(str(tmp_path)), list[int]()
    storage.write("r/run.json", b"{}")

    def breaks(record: StepRecord) -> None:
        if record.step == 2:
            raise ConnectionError("nobody is there")
        assert record.step < 2, "asked again"

    log = EventLog(storage, "r", [breaks, lambda record: heard.append(record.step)])
    for step in range(50):
        log.write(record(step))
    log.flush()
    assert heard == list(range(50))
    log.close()
    assert [r.step for r in read_events(storage, "r")] == list(range(50))
    said = [line["error"] for line in read_lines(storage, "r") if "error" in line]
    assert len(said) == 1 and "ConnectionError: nobody is there" in said[0]


def test_a_record_that_is_no_json_is_counted_and_costs_no_other(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("r/run.json", b"{}")
    log = EventLog(storage, "r")
    log.write(record(1, detail={"what": object()}))
    log.write(record(2))
    log.close()
    assert [r.step for r in read_events(storage, "r")] == [2]
    assert log.dropped == 1


# --- full files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some records."""
    monkeypatch.setattr(event_files, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(event_files, "OBJECT_SEGMENT_BYTES", 1000)
    monkeypatch.setattr(event_files, "TOTAL_BYTES", 1 << 40)
    monkeypatch.setattr(events, "UPLOAD_INTERVAL_S", 0.0)


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.usefixtures("small")
def test_full_files_are_numbered_and_read_in_order(tmp_path: Path, kind: str) -> None:
    storage = Storage(str(tmp_path) if kind == "local" else f"memory://{uuid.uuid4().hex}")
    storage.write("r/run.json", b"{}")
    for start in (0, 40):
        log = EventLog(storage, "r")
        for step in range(start, start + 40):
            log.write(record(step, detail={"counters": {"steps": float(step)}}))
            time.sleep(0.002)
        log.close()
        assert newest_counters(storage, "r") == (1.5, {"steps": start + 39.0})
    assert [r.step for r in read_events(storage, "r")] == list(range(80))
    names = [name for name in storage.names("r") if name.startswith("events-")]
    assert len(names) > 3 and names == [f"events-{n:06d}.jsonl" for n in range(1, len(names) + 1)]


WRITER = """
import sys, time
from outgrow.monitoring import event_files, events
from outgrow.contracts import StepRecord
from outgrow.storage import Storage
event_files.SEGMENT_BYTES, event_files.TOTAL_BYTES, folder = 1500, 1 << 40, sys.argv[1]
storage = Storage(folder)
last = next((line["step"] for line in event_files.newest_lines(storage, "r") if "step" in line), -1)
log = events.EventLog(storage, "r")
print("writing", flush=True)
for step in range(last + 1, 10**9):
    log.write(StepRecord(kind="step", attempt="a", time=1.0, step=step, steps=9))
    if step % 5 == 0: time.sleep(0.002)
"""


def test_kills_at_any_moment_lose_no_line_that_was_there_and_double_none(tmp_path: Path) -> None:
    storage, rng, seen = Storage(str(tmp_path)), random.Random(7), 0
    storage.write("r/run.json", b"{}")
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(0.1 + 0.2 * rng.random())
        while_it_writes = [r.step for r in read_events(storage, "r")]
        assert while_it_writes == list(range(len(while_it_writes)))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        steps = [r.step for r in read_events(storage, "r")]
        assert steps == list(range(len(steps))) and len(steps) >= max(seen + 1, len(while_it_writes))
        seen = len(steps)
    assert len(storage.names("r")) > 10


@pytest.mark.usefixtures("small")
def test_a_bucket_that_a_writer_is_killed_at_has_every_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer ends at its n-th write to the bucket, before or after that write has been done, for every n."""
    for fatal in range(12):
        for done in (False, True):
            storage = Storage(f"memory://{uuid.uuid4().hex}")
            for upload in _until_killed(storage, fatal, done, monkeypatch):
                assert upload <= len(list(read_lines_of_steps(storage)))
            before = list(read_lines_of_steps(storage))
            assert before == list(range(len(before)))
            again = ObjectSink(storage, "r", 0.0)
            for step in range(len(before), 40):
                again.append(line_of(vars(record(step))), last=step == 39)
            assert list(read_lines_of_steps(storage)) == list(range(40)), (fatal, done)


class Killed(BaseException):
    pass


def _until_killed(storage: Storage, fatal: int, done: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of lines that were written after each append."""
    write, writes = storage.write, 0

    def dying(key: str, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes <= fatal or done:
            write(key, data)
        if writes > fatal:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", dying)
        sink = ObjectSink(storage, "r", 0.0)
        try:
            for step in range(40):
                sink.append(line_of(vars(record(step))), last=False)
                yield step + 1
        except Killed:
            return


def read_lines_of_steps(storage: Storage) -> Iterator[int]:
    return (line["step"] for line in read_lines(storage, "r") if "step" in line)


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.usefixtures("small")
def test_all_files_together_are_bounded_and_only_steps_are_left_out(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_files, "TOTAL_BYTES", 10_000)
    storage = Storage(str(tmp_path) if kind == "local" else f"memory://{uuid.uuid4().hex}")
    storage.write("r/run.json", b"{}")
    sink = event_files.open_sink(storage, "r", 0.0)
    for step in range(400):
        line = record(step, kind="checkpoint" if step % 50 == 0 else "step")
        sink.append(line_of(vars(line)), last=step == 399)
    kept = list(read_events(storage, "r"))
    steps = [r.step for r in kept]
    assert steps == sorted(set(steps))
    assert [r.step for r in kept if r.kind == "checkpoint"] == list(range(0, 400, 50))
    sizes = storage.sizes("r")
    assert sum(size for name, size in sizes.items() if name.startswith("events-")) <= 10_000
    assert steps[-8:] == list(range(392, 400))
    assert len([s for s in steps if s < 200]) < len([s for s in steps if s >= 200])


def test_thinning_leaves_out_every_second_step_and_nothing_else() -> None:
    lines = [line_of(vars(record(n, kind="step" if n % 3 else "end"))) for n in range(10)]
    assert [json.loads(line)["step"] for line in thinned(b"".join(lines)).splitlines()] == [0, 2, 3, 5, 6, 8, 9]
    assert thinned(b"no json\n") == b"no json\n"


def test_what_is_twice_as_old_is_kept_half_as_densely() -> None:
    sizes: list[int] = []
    for _ in range(60):
        sizes.append(1024)
        while sum(sizes) > 8 * 1024:
            sizes[next_to_thin(sizes)] //= 2
    assert sizes[-1] == 1024
    assert sizes == sorted(sizes)


def test_counters_are_read_from_the_end_of_a_big_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("r/run.json", b"{}")
    assert newest_counters(storage, "r") is None
    sink = event_files.open_sink(storage, "r", 0.0)
    lines = [line_of(vars(record(n, time=float(n), detail={"counters": {"steps": float(n)}}))) for n in range(30_000)]
    sink.append(b"".join(lines), last=False)
    sink.append(line_of(vars(record(1, kind="end", detail={"folder": "x" * 200_000}))), last=True)
    asked = 0
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal asked
        asked += count
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert newest_counters(storage, "r") == (29_999.0, {"steps": 29_999.0})
    assert asked < 1_000_000


@pytest.mark.usefixtures("small")
def test_a_file_that_gets_its_number_while_it_is_read_backwards_is_read_on(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("r/run.json", b"{}")
    assert not has_lines(storage, "r")
    sink = event_files.open_sink(storage, "r", 0.0)
    sink.append(line_of(vars(record(1, detail={"text": "x" * 500}))), last=False)
    sink.append(line_of(vars(record(2))), last=False)
    lines = newest_lines(storage, "r")
    assert next(lines)["step"] == 2
    sink.append(line_of(vars(record(3, detail={"text": "x" * 500}))), last=False)
    assert "events.jsonl" not in storage.names("r") and has_lines(storage, "r")
    assert [line["step"] for line in lines] == [1]
    assert [line["step"] for line in newest_lines(storage, "r")] == [3, 2, 1]


def test_a_line_for_a_person() -> None:
    line = describe(record(4, loss=2.5, learning_rate=1e-3, tokens_per_s=1234.6, step_s=2.0, data_wait_s=0.01))
    assert line == "step 4/9  loss 2.5000  lr 1.00e-03  1,235 tokens/s  data wait 0.5%  ETA 10s"
    assert describe(record(4, kind="validation", loss=2.0, detail={"streams": {"a": 1.0, "b": 3.0}})) == (
        "step 4/9  validation loss 2.0000  (a 1.0000, b 3.0000)"
    )
    assert [duration(s) for s in (7, 185, 3720)] == ["7s", "3m05s", "1h02m"]
