"""The NVIDIA driver itself, through NVML. ``python -m outgrow.monitoring.agent.nvml_live FILE`` records what it says now."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pynvml  # type: ignore[import-untyped]

from outgrow.monitoring.agent.nvml import GpuReading, PcieReading, Snapshot, XidCount

T = TypeVar("T")

AGAIN_S = 60.0
"""A driver that was not there, or a GPU that did not answer, is asked again after so long."""
_ABSENT = (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)
_GONE = (
    pynvml.NVMLError_GpuIsLost,
    pynvml.NVMLError_ResetRequired,
    pynvml.NVMLError_Uninitialized,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_InvalidArgument,
)
"""The device has fallen off the bus or is being reset, or the driver is loaded anew. After any other error the device is
there: it lacks one value, or keeps it to itself."""
_EVENT_WAIT_MS = 1000


@dataclass(frozen=True)
class _Device:
    index: int
    handle: Any
    uuid: str
    name: str


class LiveReader:
    """Values of the GPUs of this machine. ``gpus`` and ``pcie`` may be called from two threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._next = 0.0
        self._number = 0
        self._devices: dict[int, _Device] = {}
        self._watch: XidWatch | None = None

    def gpus(self) -> Sequence[GpuReading]:
        """Raises ``NVMLError`` where there is a driver but it does not answer."""
        return tuple(self._each(_read_gpu))

    def pcie(self) -> Sequence[PcieReading]:
        return tuple(self._each(_read_pcie))

    def xids(self) -> Sequence[XidCount]:
        return self._watch.counts() if self._watch is not None else ()

    def driver(self) -> str:
        """The driver's version; empty without one."""
        return str(pynvml.nvmlSystemGetDriverVersion()) if self._ready() else ""

    def _each(self, read: Callable[[_Device], T]) -> Iterator[T]:
        """What ``read`` gives of every GPU that answers."""
        for device in self._ready():
            try:
                yield read(device)
            except _GONE:
                # Its own series end, and it is looked for again a little later.
                with self._lock:
                    self._devices.pop(device.index, None)

    def _ready(self) -> list[_Device]:
        """The GPUs by index, after opening what can be opened again."""
        with self._lock:
            complete = self._open and len(self._devices) == self._number
            if not complete and time.monotonic() >= self._next:
                self._next = time.monotonic() + AGAIN_S
                self._find()
            return sorted(self._devices.values(), key=lambda device: device.index)

    def _find(self) -> None:
        if not self._devices:
            # Also after the driver was loaded anew: what was opened before is good for nothing then.
            self._close()
            try:
                pynvml.nvmlInit()
            except _ABSENT:
                return
            self._open = True
        self._number = int(pynvml.nvmlDeviceGetCount())
        for index in set(range(self._number)) - set(self._devices):
            with contextlib.suppress(pynvml.NVMLError):
                self._devices[index] = _open_device(index)
        if self._watch is None and self._devices:
            self._watch = XidWatch()

    def _close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _open_device(index: int) -> _Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return _Device(index, handle, uuid=str(pynvml.nvmlDeviceGetUUID(handle)), name=str(pynvml.nvmlDeviceGetName(handle)))


def _value(ask: Callable[..., T], *arguments: Any) -> T | None:
    """None where the device does not tell; raises where it is gone."""
    try:
        return ask(*arguments)
    except _GONE:
        raise
    except pynvml.NVMLError:
        return None


def _read_gpu(device: _Device) -> GpuReading:
    handle = device.handle
    memory = _value(pynvml.nvmlDeviceGetMemoryInfo, handle)
    rates = _value(pynvml.nvmlDeviceGetUtilizationRates, handle)
    return GpuReading(
        index=device.index,
        uuid=device.uuid,
        name=device.name,
        utilisation_percent=None if rates is None else rates.gpu,
        memory_total_bytes=None if memory is None else memory.total,
        memory_used_bytes=None if memory is None else memory.used,
        power_mw=_value(pynvml.nvmlDeviceGetPowerUsage, handle),
        power_limit_mw=_value(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
        temperature_c=_value(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        sm_clock_mhz=_value(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        clocks_event_reasons=_value(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
    )


def _read_pcie(device: _Device) -> PcieReading:
    return PcieReading(
        index=device.index,
        sent_kb_per_s=_value(pynvml.nvmlDeviceGetPcieThroughput, device.handle, pynvml.NVML_PCIE_UTIL_TX_BYTES),
        received_kb_per_s=_value(pynvml.nvmlDeviceGetPcieThroughput, device.handle, pynvml.NVML_PCIE_UTIL_RX_BYTES),
    )


class XidWatch:
    """Counts the errors that the driver reports, by GPU; a thread waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, int]] = Counter()
        threading.Thread(target=self._run, name="nvml-xid", daemon=True).start()

    def counts(self) -> Sequence[XidCount]:
        with self._lock:
            return tuple(XidCount(index=index, xid=xid, count=count) for (index, xid), count in sorted(self._counts.items()))

    def _run(self) -> None:
        while True:
            with contextlib.suppress(pynvml.NVMLError):
                self._watch()
            # The driver is being loaded anew, or a GPU is lost: it goes on with those that are there a little later.
            time.sleep(AGAIN_S)

    def _watch(self) -> None:
        """Wait for events until the driver fails."""
        # NVML counts who has opened it: this is apart from what the reader opens and closes.
        pynvml.nvmlInit()
        try:
            events = pynvml.nvmlEventSetCreate()
            try:
                index_of = dict(_register(events))
                while index_of:
                    self._take(events, index_of)
            finally:
                pynvml.nvmlEventSetFree(events)
        finally:
            pynvml.nvmlShutdown()

    def _take(self, events: Any, index_of: Mapping[int | None, int]) -> None:
        try:
            event = pynvml.nvmlEventSetWait_v2(events, _EVENT_WAIT_MS)
        except pynvml.NVMLError_Timeout:
            return
        index = index_of.get(_pointer(event.device))
        if index is not None and event.eventType == pynvml.nvmlEventTypeXidCriticalError:
            with self._lock:
                self._counts[index, int(event.eventData)] += 1


def _register(events: Any) -> Iterator[tuple[int | None, int]]:
    """Pointer and index of every GPU whose errors are told from now on."""
    for index in range(int(pynvml.nvmlDeviceGetCount())):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
            yield _pointer(handle), index


def _pointer(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def snapshot() -> Snapshot:
    """All that the driver says now."""
    reader = LiveReader()
    return Snapshot(time=time.time(), driver=reader.driver(), gpus=tuple(reader.gpus()), pcie=tuple(reader.pcie()), xids=())


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps(snapshot().to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
