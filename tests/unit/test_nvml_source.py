"""GPU series: units and labels against NVML's documentation, a driver that is absent, loses a GPU, hangs, or reports errors.

The driver is a library of ours (tests/fake_nvml.cpp) in the place of NVIDIA's, so all of the real reader runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from doctor import need

from outgrow.monitoring import metrics
from outgrow.monitoring.agent import nvml
from outgrow.monitoring.agent.nvml import GpuReading, NvmlSource, PcieReading, RecordedReader, XidCount, gpu_samples
from outgrow.monitoring.agent.nvml_live import LiveReader
from outgrow.monitoring.agent.samples import Sample

TESTS = Path(__file__).resolve().parents[1]
SNAPSHOT = TESTS / "files" / "nvml_snapshot.json"


def values(samples: Iterator[Sample]) -> dict[tuple[str, tuple[str, ...]], float]:
    found = [((sample.metric.name, sample.labels), sample.value) for sample in samples]
    assert len(dict(found)) == len(found), "a series came twice"
    return dict(found)


def test_a_recorded_snapshot_in_base_units() -> None:
    found = values(NvmlSource(RecordedReader(SNAPSHOT), "n").samples([]))
    wanted = {
        ("outgrow_gpu_info", ("n", "0", "GPU-5a1c2b34-0d6e-4f70-9a81-b2c3d4e5f607", "NVIDIA H200")): 1.0,
        ("outgrow_gpu_utilisation_ratio", ("n", "0")): 0.98,
        ("outgrow_gpu_memory_bytes", ("n", "0", "total")): 150754820096,
        ("outgrow_gpu_memory_bytes", ("n", "0", "used")): 121332826112,
        ("outgrow_gpu_power_watts", ("n", "0")): 652.318,
        ("outgrow_gpu_power_limit_watts", ("n", "1")): 600.0,
        ("outgrow_gpu_temperature_celsius", ("n", "1")): 88,
        ("outgrow_gpu_clock_hertz", ("n", "1")): 1.447e9,
        ("outgrow_gpu_pcie_bytes_per_second", ("n", "0", "sent")): 21450e3,
        ("outgrow_gpu_pcie_bytes_per_second", ("n", "1", "received")): 942300e3,
        ("outgrow_gpu_xid_errors_total", ("n", "1", "94")): 2,
    }
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    throttled = {labels[1:]: value for (name, labels), value in found.items() if name == "outgrow_gpu_throttled"}
    assert {key for key, value in throttled.items() if value} == {("0", "power"), ("1", "thermal"), ("1", "hardware")}
    assert len(throttled) == 10
    declared = {metric.name for metric in metrics.METRICS.values() if metric.name.startswith("outgrow_gpu_")}
    assert {name for name, _ in found} == declared


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0x0, set()),
        (0x1, set()),  # idle
        (0x2 | 0x100, set()),  # clocks that somebody has set
        (0x4, {"power"}),
        (0x8, {"hardware"}),
        (0x10, {"sync"}),
        (0x20, {"thermal"}),
        (0x40 | 0x8, {"thermal", "hardware"}),
        (0x80 | 0x8, {"brake", "hardware"}),
    ],
)
def test_reasons_for_lower_clocks(bits: int, reasons: set[str]) -> None:
    gpu = replace(RecordedReader(SNAPSHOT).gpus()[0], clocks_event_reasons=bits)
    throttled = [sample for sample in gpu_samples("n", gpu) if sample.metric is metrics.GPU_THROTTLED]
    assert {sample.labels[2] for sample in throttled if sample.value} == reasons
    assert {sample.labels[2] for sample in throttled} == {"power", "thermal", "hardware", "brake", "sync"}


def test_what_a_device_does_not_tell_is_no_series() -> None:
    silent = {name: None for name in GpuReading.__dataclass_fields__ if name not in ("index", "uuid", "name")}
    gpu = replace(RecordedReader(SNAPSHOT).gpus()[0], **silent)
    assert [sample.metric for sample in gpu_samples("n", gpu)] == [metrics.GPU_INFO]


class Hanging:
    """A driver of eight GPUs that answers the first time only, and whose PCIe counters take their 20 ms each."""

    def __init__(self) -> None:
        self.asked = 0
        self.end = threading.Event()

    def gpus(self) -> Sequence[GpuReading]:
        self.asked += 1
        if self.asked > 1:
            self.end.wait()
        return [replace(RecordedReader(SNAPSHOT).gpus()[0], index=index) for index in range(8)]

    def pcie(self) -> Sequence[PcieReading]:
        time.sleep(0.32)
        return [PcieReading(index=index, sent_kb_per_s=1, received_kb_per_s=2) for index in range(8)]

    def xids(self) -> Sequence[XidCount]:
        return ()


def test_a_slow_or_hanging_driver_does_not_hold_up_a_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Hanging()
    source = NvmlSource(reader, "n")
    pcie, took_s = [], []
    for _ in range(12):
        begun = time.monotonic()
        found = values(source.samples([]))
        took_s.append(time.monotonic() - begun)
        assert len([1 for name, _ in found if name == "outgrow_gpu_power_watts"]) == 8
        pcie.append(len([1 for name, _ in found if name == "outgrow_gpu_pcie_bytes_per_second"]))
        time.sleep(0.03)
    assert median(took_s) < 0.1, "the machine may be busy with something else now and then"
    assert max(took_s) < 1.0
    assert pcie[0] == 0 and pcie[-1] == 16, "what was read in the background is shown later"
    assert reader.asked == 2, "one call that hangs is not joined by others"
    monkeypatch.setattr(nvml, "MAX_AGE_S", 0.0)
    with pytest.raises(TimeoutError, match="has not answered"):
        values(source.samples([]))
    reader.end.set()


def test_without_a_driver_there_is_nothing_and_no_error() -> None:
    reader = LiveReader()
    if reader.driver():
        pytest.skip("this machine has an NVIDIA driver")
    assert values(NvmlSource(reader, "n").samples([])) == {}


# --- the real reader on a library of ours -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("g++")
    folder = tmp_path_factory.mktemp("nvml")
    source, target = TESTS / "fake_nvml.cpp", folder / "libnvidia-ml.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", target, source], check=True, timeout=60)
    return folder


def read_live(library: Path, switches: Path, code: str) -> list[object]:
    """What ``code`` shows with ``show(value)`` in a process whose driver is ours.

    ``switch`` and ``unswitch`` turn the ways of the driver on and off; ``again`` lets so much time pass that it is asked again.
    """
    beginning = f"""
import json, time, pathlib
from outgrow.monitoring.agent import nvml_live
class Clock:
    now = 0.0
    monotonic = staticmethod(lambda: Clock.now)
    sleep = staticmethod(lambda seconds: time.sleep(0.05))
    time = staticmethod(time.time)
nvml_live.time = Clock
folder = pathlib.Path({str(switches)!r})
def show(value): print(json.dumps(value))
def switch(name, text=""): (folder / name).write_text(text)
def unswitch(name): (folder / name).unlink()
def again(): Clock.now += 60
def indexes(values): return [value.index for value in values]
reader = nvml_live.LiveReader()
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(switches)}
    done = subprocess.run(
        [sys.executable, "-c", beginning + code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_value_of_the_driver(library: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.json"
    code = f"import sys; sys.argv[1:] = [{str(file)!r}]; nvml_live.main()"
    assert read_live(library, tmp_path, code) == []
    recorded = RecordedReader(file)
    assert recorded.gpus() == (
        GpuReading(
            index=0,
            uuid="GPU-zero",
            name="NVIDIA H200",
            utilisation_percent=98,
            memory_total_bytes=1000,
            memory_used_bytes=600,
            power_mw=650000,
            power_limit_mw=700000,
            temperature_c=64,
            sm_clock_mhz=1830,
            clocks_event_reasons=4,
        ),
        GpuReading(
            index=1,
            uuid="GPU-one",
            name="NVIDIA B200",
            utilisation_percent=3,
            memory_total_bytes=1000,
            memory_used_bytes=600,
            power_mw=90000,
            power_limit_mw=600000,
            temperature_c=31,
            sm_clock_mhz=345,
            clocks_event_reasons=1,
        ),
    )
    assert recorded.pcie() == (
        PcieReading(index=0, sent_kb_per_s=100, received_kb_per_s=2000),
        PcieReading(index=1, sent_kb_per_s=None, received_kb_per_s=None),
    )


def test_a_lost_gpu_costs_its_own_series_and_comes_back(library: Path, tmp_path: Path) -> None:
    code = """
show(indexes(reader.gpus()))
switch("lost-0"); show(indexes(reader.gpus())); show(indexes(reader.pcie()))
switch("lost-1"); again(); show(indexes(reader.gpus()))
unswitch("lost-0"); again(); show(indexes(reader.gpus()))
unswitch("lost-1"); again(); show(indexes(reader.gpus()))
"""
    assert read_live(library, tmp_path, code) == [[0, 1], [1], [1], [], [0], [0, 1]]


def test_one_value_that_cannot_be_read_costs_no_other(library: Path, tmp_path: Path) -> None:
    code = 'switch("broken"); show([gpu.power_mw for gpu in reader.gpus()]); show([gpu.temperature_c for gpu in reader.gpus()])'
    assert read_live(library, tmp_path, code) == [[None, None], [64, 31]]


def test_a_driver_that_comes_late_or_is_loaded_anew(library: Path, tmp_path: Path) -> None:
    code = """
switch("absent"); show(indexes(reader.gpus()))
unswitch("absent"); show(indexes(reader.gpus())); again(); show(indexes(reader.gpus()))
switch("absent"); show(indexes(reader.gpus())); again(); show(indexes(reader.gpus()))
unswitch("absent"); again(); show(indexes(reader.gpus()))
"""
    # A driver that was absent is not asked for again at once.
    assert read_live(library, tmp_path, code) == [[], [], [0, 1], [], [], [0, 1]]


def test_xid_errors_are_counted_by_gpu(library: Path, tmp_path: Path) -> None:
    code = """
reader.gpus()
def wait(number):
    deadline = time.monotonic() + 20
    while sum(one.count for one in reader.xids()) < number and time.monotonic() < deadline: time.sleep(0.01)
    show([one.to_dict() for one in reader.xids()])
def tell(text): switch("aside", text); (folder / "aside").rename(folder / "xid")
tell("1 79"); wait(1)
tell("0 43"); wait(2)
switch("absent"); time.sleep(0.2); unswitch("absent")
tell("1 79"); wait(3)
"""
    first, second = {"index": 1, "xid": 79, "count": 1}, {"index": 0, "xid": 43, "count": 1}
    assert read_live(library, tmp_path, code) == [[first], [second, first], [second, {**first, "count": 2}]]
