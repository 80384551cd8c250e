"""What the NVIDIA driver says about a node's GPUs.

A reader gives the driver's own values in the driver's own units: ``nvml_live.LiveReader`` asks it, ``RecordedReader`` has a
file of what it once said. ``NvmlSource`` makes samples of them, the same way for both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from outgrow.contracts import Record
from outgrow.monitoring import metrics
from outgrow.monitoring.agent.background import Background
from outgrow.monitoring.agent.samples import Sample
from outgrow.monitoring.metrics import Metric

if TYPE_CHECKING:
    from outgrow.monitoring.agent.scan import RunView

WAIT_S = 0.03
MAX_AGE_S = 60.0
"""Values that are older are not shown."""

THROTTLE_REASONS: Mapping[str, int] = {
    "power": 0x04,  # SwPowerCap: the power limit
    "thermal": 0x20 | 0x40,  # SwThermalSlowdown, HwThermalSlowdown
    "hardware": 0x08,  # HwSlowdown: clocks halved or worse, whatever made the board do it
    "brake": 0x80,  # HwPowerBrakeSlowdown: the power supply asked for it
    "sync": 0x10,  # SyncBoost: as slow as the slowest of a group
}
"""Bits of ``nvmlDeviceGetCurrentClocksEventReasons`` by the value of the label ``reason``; an idle GPU and clocks that somebody
has set are no throttling."""


@dataclass(frozen=True, kw_only=True)
class GpuReading(Record):
    """One GPU in NVML's units; None where the device does not tell. PCIe is read apart, as it takes NVML 20 ms a value."""

    index: int
    uuid: str
    name: str
    utilisation_percent: int | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    power_mw: int | None
    power_limit_mw: int | None
    temperature_c: int | None
    sm_clock_mhz: int | None
    clocks_event_reasons: int | None


@dataclass(frozen=True, kw_only=True)
class PcieReading(Record):
    """PCIe traffic of one GPU in kB/s over 20 ms: ``sent`` by the GPU, and ``received``; None where it does not tell."""

    index: int
    sent_kb_per_s: int | None
    received_kb_per_s: int | None


@dataclass(frozen=True, kw_only=True)
class XidCount(Record):
    """How often the driver has reported the error ``xid`` of one GPU."""

    index: int
    xid: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Snapshot(Record):
    """All that a reader gives, at one time (Unix seconds); ``driver`` is its version."""

    time: float
    driver: str
    gpus: tuple[GpuReading, ...]
    pcie: tuple[PcieReading, ...]
    xids: tuple[XidCount, ...]


class Reader(Protocol):
    """Where the driver's values come from. Without a driver nothing is read, and nothing raised."""

    def gpus(self) -> Sequence[GpuReading]: ...
    def pcie(self) -> Sequence[PcieReading]: ...
    def xids(self) -> Sequence[XidCount]: ...


class RecordedReader:
    """What ``record`` wrote, again and again."""

    def __init__(self, path: Path) -> None:
        """Raises ``OSError``, ``ValueError``, ``TypeError`` or ``KeyError`` where ``path`` holds no snapshot."""
        self._snapshot = Snapshot.from_dict(json.loads(path.read_text()))

    def gpus(self) -> Sequence[GpuReading]:
        return self._snapshot.gpus

    def pcie(self) -> Sequence[PcieReading]:
        return self._snapshot.pcie

    def xids(self) -> Sequence[XidCount]:
        return self._snapshot.xids


class NvmlSource:
    """Samples of the GPUs. A driver that hangs costs these samples, and no more of a scrape than ``WAIT_S``."""

    part = "nvml"

    def __init__(self, reader: Reader, host: str) -> None:
        self._reader, self._host = reader, host
        self._gpus = Background(reader.gpus, name="nvml")
        self._pcie = Background(reader.pcie, name="nvml-pcie")

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        gpus = self._gpus.get(WAIT_S)
        if gpus is not None and gpus.value and gpus.age_s <= MAX_AGE_S:
            for gpu in gpus.value:
                yield from gpu_samples(self._host, gpu)
            # Eight GPUs take longer than a scrape may: they show what was read at the scrape before.
            pcie = self._pcie.get(WAIT_S)
            for traffic in pcie.value if pcie is not None and pcie.age_s <= MAX_AGE_S else ():
                yield from pcie_samples(self._host, traffic)
        for one in self._reader.xids():
            yield Sample(metrics.GPU_XID, (self._host, str(one.index), str(one.xid)), one.count)
        if gpus is not None and gpus.age_s > MAX_AGE_S:
            raise TimeoutError(f"the NVIDIA driver has not answered for {gpus.age_s:.0f} s")


def gpu_samples(host: str, gpu: GpuReading) -> Iterator[Sample]:
    """In base units; what the device does not tell is left out."""
    labels = (host, str(gpu.index))
    yield Sample(metrics.GPU_INFO, (*labels, gpu.uuid, gpu.name), 1.0)
    values: tuple[tuple[Metric, tuple[str, ...], int | None, float], ...] = (
        (metrics.GPU_UTILISATION, (), gpu.utilisation_percent, 1e-2),
        (metrics.GPU_MEMORY, ("total",), gpu.memory_total_bytes, 1),
        (metrics.GPU_MEMORY, ("used",), gpu.memory_used_bytes, 1),
        (metrics.GPU_POWER, (), gpu.power_mw, 1e-3),
        (metrics.GPU_POWER_LIMIT, (), gpu.power_limit_mw, 1e-3),
        (metrics.GPU_TEMPERATURE, (), gpu.temperature_c, 1),
        (metrics.GPU_CLOCK, (), gpu.sm_clock_mhz, 1e6),
    )
    for metric, more, value, unit in values:
        if value is not None:
            yield Sample(metric, (*labels, *more), value * unit)
    if gpu.clocks_event_reasons is not None:
        for reason, bits in THROTTLE_REASONS.items():
            yield Sample(metrics.GPU_THROTTLED, (*labels, reason), float(bool(gpu.clocks_event_reasons & bits)))


def pcie_samples(host: str, pcie: PcieReading) -> Iterator[Sample]:
    for direction, value in (("sent", pcie.sent_kb_per_s), ("received", pcie.received_kb_per_s)):
        if value is not None:
            yield Sample(metrics.GPU_PCIE, (host, str(pcie.index), direction), value * 1e3)
