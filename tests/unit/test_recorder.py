"""A rank's record: whole for every reader, adding up over kills and restarts, and never going back."""

from __future__ import annotations

import array
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from outgrow.monitoring.recording import recorder as recorder_module
from outgrow.monitoring.recording.rank_file import RankFile, file_name, read_record
from outgrow.monitoring.recording.recorder import Before, Recorder, is_alive
from outgrow.monitoring.recording.slots import COUNTERS, INDEX, PHASES, RECENT_STEPS, STATES, WALL, Wall
from outgrow.monitoring.recording.stall import median_step_s

HAMMER = """
import sys
from pathlib import Path
from outgrow.monitoring.recording.rank_file import RankFile
file = RankFile(Path(sys.argv[1]), {})
print("ready", flush=True)
number = 0.0
while True:
    number += 1.0
    with file.writing() as values:
        for slot in range(len(values)):
            values[slot] = number
"""
TRAINS = """
import sys, time
from pathlib import Path
from outgrow.monitoring.recording.recorder import Before, Recorder
runs, attempt, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
recorder = Recorder(runs / attempt, 0, launched=float(sys.argv[4]), before=Before.of_records(runs, 0), stall_after_s=60.0)
time.sleep(0.05)
recorder.enter("restore")
time.sleep(0.05)
recorder.enter_steps()
for step in range(first, first + 1000):
    time.sleep(0.02)
    recorder.times({"data_wait": 0.005, "forward": 0.015}, 0.02)
    recorder.step(step=step + 1, epoch=0, tokens=30, padding=2, samples=4, flops=1e6)
    if step % 5 == 4:
        recorder.enter("checkpoint")
        time.sleep(0.02)
        recorder.enter_steps()
    print(step + 1, flush=True)
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wall(record: dict[str, float]) -> dict[str, float]:
    return {kind: record[f"wall_s.{kind}"] for kind in WALL}


def recorder(folder: Path | None, **given: Any) -> Recorder:
    return Recorder(folder, 0, **{"launched": time.time(), "before": None, "stall_after_s": 60.0, **given})


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_reader_never_sees_half_a_change_while_a_writer_hammers_nor_after_it_was_killed(tmp_path: Path) -> None:
    for attempt in range(3):
        path = tmp_path / f"{attempt}.rec"
        writer = start(HAMMER, path)
        assert said(writer) == "ready"
        seen, deadline = set(), time.monotonic() + 1.0
        try:
            while time.monotonic() < deadline:
                record = read_record(path)
                assert record is not None
                values = set(record.values())
                # Before the first change counters are 0 and gauges NaN, each NaN a value of its own.
                assert len(values) == 1 or 0.0 in values, "torn"
                seen |= values if len(values) == 1 else set()
        finally:
            kill(writer)
        assert len(seen) > 20
        last = read_record(path)
        assert last is not None and len(set(last.values())) == 1


def test_a_read_that_sees_the_number_of_a_change_before_its_values_takes_the_change_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a processor may that copies a file's end before its beginning."""
    file = RankFile(tmp_path / "0.rec", {})
    for number in range(1, 8):
        file.values[:] = array.array("d", [float(number)] * len(file.values))
        file.publish()
    read = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        data = read(descriptor, size, offset)
        if len(data) > 16:  # the eighth change comes here: its number is seen, its values are not
            data = array.array("d", [*array.array("d", data[:8]), 8.0]).tobytes() + data[16:]
        return data

    monkeypatch.setattr(os, "pread", pread)
    record = read_record(tmp_path / "0.rec")
    assert record is not None and set(record.values()) == {7.0}


def test_a_record_of_another_format_and_half_a_file_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "1" / file_name(0)
    recorder(path.parent).close("finished")
    good = path.read_bytes()
    assert read_record(path) is not None
    path.write_bytes(good[:8][::-1] + good[8:])
    assert read_record(path) is None
    for content in (good[:-8], good + bytes(8), b""):
        path.write_bytes(content)
        assert read_record(path) is None
    path.unlink()
    assert read_record(path) is None


def test_a_closed_record_keeps_its_values(tmp_path: Path) -> None:
    file = RankFile(tmp_path / file_name(0), {"steps": 3.0})
    with file.writing() as values:
        values[INDEX["tokens"]] = 7.0
    file.close()
    record = read_record(tmp_path / file_name(0))
    assert record is not None and (record["steps"], record["tokens"]) == (3.0, 7.0)
    assert math.isnan(record["loss"])


# --- the account of wall time -----------------------------------------------------------------------------------------


def test_wall_seconds_add_up_over_kills_and_restarts_and_no_counter_goes_back(tmp_path: Path) -> None:
    began = time.time()
    before: dict[str, float] = {}
    furthest = 0
    for attempt in range(3):
        if attempt:
            time.sleep(0.3)  # nothing is started
        process = start(TRAINS, tmp_path, f"{attempt:03d}-a", max(0, furthest - 10), time.time())
        for _ in range(random.Random(attempt).randrange(12, 30)):
            furthest = max(furthest, int(said(process)))
            record = read_record(tmp_path / f"{attempt:03d}-a" / file_name(0))
            assert record is not None and is_alive(record)
            assert all(record[name] >= before.get(name, 0.0) for name in COUNTERS)
            before = record
        kill(process)
        assert not is_alive(before)
    record = read_record(tmp_path / "002-a" / file_name(0))
    assert record is not None
    assert record["first_start"] == pytest.approx(began, abs=0.05)
    assert sum(wall(record).values()) == pytest.approx(record["touched"] - record["first_start"], rel=0.001)
    assert sum(wall(record).values()) == pytest.approx(record["touched"] - began, rel=0.01)
    # A sleep may be longer on a busy machine, never shorter.
    assert 0.6 <= wall(record)["idle"] < 1.5
    assert 0.14 < wall(record)["restore"] < 0.5
    assert 0.3 < wall(record)["recompute"] < 1.2, "ten steps twice, less the data that they waited for"
    assert wall(record)["stalled"] == pytest.approx(record["phase_s.data_wait"], rel=0.05)


class Clock:
    """Both clocks of ``time``, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return 1e9 + self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(recorder_module, "time", made)
    return made


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_each_second_is_counted_once(seed: int, tmp_path: Path, clock: Clock) -> None:
    draw, before = random.Random(seed), None
    began, expected_steps = clock.time(), 0
    launched = began
    for attempt in range(4):
        one = Recorder(tmp_path / f"{attempt}", 0, launched=launched, before=before, stall_after_s=5.0)
        step = draw.randrange(20)
        for _ in range(draw.randrange(40)):
            clock.now += draw.choice([0.1, 1.0, 9.0]) * draw.random()
            match draw.randrange(4):
                case 0:
                    one.enter(cast(Wall, draw.choice(["restore", "checkpoint", "productive", "init"])))
                case 1:
                    one.enter_steps()
                case 2:
                    one.times({"data_wait": 3 * draw.random()}, draw.random())
                case 3:
                    step += 1
                    expected_steps += 1
                    one.step(step=step, epoch=0, tokens=1, padding=0, samples=1, flops=0.0)
            counters = one.counters()
            assert sum(counters[f"wall_s.{kind}"] for kind in WALL) == pytest.approx(clock.time() - began, abs=1e-6)
        clock.now += draw.random()  # and it is killed
        record = read_record(tmp_path / f"{attempt}" / file_name(0))
        assert record is not None and record["steps"] == expected_steps
        before = Before.of_records(tmp_path, 0)
        launched = clock.time() + draw.choice([-100.0, 0.5])
        clock.now += 1.0


def test_what_a_step_takes_beyond_the_threshold_and_waiting_for_data_is_stalled(tmp_path: Path, clock: Clock) -> None:
    one = recorder(tmp_path, launched=clock.time(), stall_after_s=2.0)
    one.enter_steps()
    for number, (seconds, waited) in enumerate([(1.0, 0.25), (10.0, 0.0), (1.0, 0.0)]):
        clock.now += seconds
        one.times({"data_wait": waited}, seconds)
        one.step(step=number + 1, epoch=0, tokens=1, padding=0, samples=1, flops=0.0)
    record = read_record(tmp_path / file_name(0))
    assert record is not None
    assert wall(record)["stalled"] == pytest.approx(0.25 + 10.0 - 5 * 1.0)
    clock.now += 100.0
    assert one.open_s() == 100.0
    assert one.threshold_s() == 5.0
    one.enter("checkpoint")
    assert one.threshold_s() == 600.0
    one.enter_steps()
    clock.now += 100.0
    one.step(step=4, epoch=0, tokens=1, padding=0, samples=1, flops=0.0)
    record = read_record(tmp_path / file_name(0))
    assert record is not None and wall(record)["stalled"] == pytest.approx(5.25 + 95.0)


def test_a_clock_that_was_set_back_takes_nothing_away(tmp_path: Path, clock: Clock) -> None:
    recorder(tmp_path / "1", launched=clock.time()).close("failed")
    first = read_record(tmp_path / "1" / file_name(0))
    clock.now -= 3600.0
    recorder(tmp_path / "2", launched=clock.time(), before=Before.of_records(tmp_path, 0))
    second = read_record(tmp_path / "2" / file_name(0))
    assert first is not None and second is not None
    assert all(second[name] >= first[name] for name in COUNTERS)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_median_is_that_of_the_last_steps(tmp_path: Path) -> None:
    draw, times = random.Random(1), []
    one = recorder(tmp_path, stall_after_s=0.0)
    for _ in range(3 * RECENT_STEPS):
        times.append(draw.choice([0.1, 0.2, draw.random()]))
        one.times({}, times[-1])
        one.set()
        record = read_record(tmp_path / file_name(0))
        expected = statistics.median(times[-RECENT_STEPS:])
        assert record is not None and median_step_s(record) == expected
    one.enter_steps()
    assert one.threshold_s() == 5 * expected


def test_counters_go_on_from_the_newest_record_that_can_be_read(tmp_path: Path) -> None:
    assert Before.of_records(tmp_path, 0) is None
    for number in (1, 2, 3):
        one = recorder(tmp_path / f"{number}", before=Before.of_records(tmp_path, 0))
        one.enter_steps()
        one.step(step=number, epoch=0, tokens=10, padding=1, samples=2, flops=5.0)
        one.add(nonfinite=1)
        one.close("finished")
    (tmp_path / "3" / file_name(0)).write_bytes(b"torn")
    (tmp_path / "4").mkdir()
    before = Before.of_records(tmp_path, 0)
    assert before is not None and before.counters["tokens"] == 20 and before.furthest == 2
    assert Before.of_records(tmp_path, 1) is None


def test_a_rank_that_comes_to_another_node_goes_on_from_what_it_said(tmp_path: Path) -> None:
    one = recorder(tmp_path / "1")
    one.enter_steps()
    one.step(step=4, epoch=0, tokens=10, padding=1, samples=2, flops=5.0)
    counters, now = one.counters(), time.time()
    before = Before.of_counters(now, counters)
    assert before is not None
    other = recorder(tmp_path / "2", before=before)
    assert {name: other.counters()[name] for name in ("steps", "tokens", "furthest", "first_start")} == {
        name: counters[name] for name in ("steps", "tokens", "furthest", "first_start")
    }
    assert Before.of_counters(now, {"steps": 3}) is None
    hostile = Before.of_counters(now, counters | {"tokens": "many", "samples": math.nan, "else": 1.0})
    assert hostile is not None and (hostile.counters["tokens"], hostile.counters["samples"]) == (0.0, 0.0)


def test_a_record_says_how_its_rank_is(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    path = tmp_path / file_name(0)

    def record() -> dict[str, float]:
        found = read_record(path)
        assert found is not None
        return found

    assert STATES[int(record()["state"])] == "starting" and is_alive(record()) and record()["pid"] == os.getpid()
    one.enter("restore")
    assert (WALL[int(record()["open_kind"])], record()["stepping"]) == ("restore", 0)
    one.enter_steps()
    assert STATES[int(record()["state"])] == "running" and record()["stepping"] == 1
    one.set(loss=2.5, tokens_per_s=None)
    assert record()["loss"] == 2.5 and math.isnan(record()["tokens_per_s"])
    one.checkpoint_committed(100, {"copy": 1.0, "commit": 2.0}, 5.0)
    one.restarted("rank_lost")
    one.add_phase("validation", 3.0)
    one.close("interrupted")
    last = record()
    assert STATES[int(last["state"])] == "interrupted" and math.isnan(last["open_kind"])
    assert (last["checkpoints_committed"], last["checkpoint_bytes"], last["checkpoint_s.commit"]) == (1, 100, 2.0)
    assert (last["restarts.rank_lost"], last["phase_s.validation"], last["checkpoint_time"]) == (1, 3.0, 5.0)
    assert sum(last[f"phase_s.{phase}"] for phase in PHASES) == 3.0


def test_without_a_folder_it_counts_in_memory(tmp_path: Path) -> None:
    one = recorder(None)
    one.enter_steps()
    one.step(step=1, epoch=0, tokens=10, padding=1, samples=2, flops=5.0)
    one.close("finished")
    assert one.counters()["tokens"] == 10


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        recorder(tmp_path / "file" / "below")
