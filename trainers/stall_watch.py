"""What a rank was doing when a step stalled: the stacks of all its threads, and the collectives that it waits in.

The flight recorder of torch keeps the last collectives of every process group, gloo's and NCCL's; it is on by itself, so no
variable is set for it. The dump of a rank that waits names the collective that another has not come to.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

POLL_S = 1.0
KEPT = 20
"""Dumps of a run on this node; older ones are removed."""
STACKS = "stack.txt"
COLLECTIVES = "flight_recorder.json"


class StallWatch:
    """Writes one folder ``<time>-rank-00000`` into ``folder`` for each stall of this rank, from a thread of its own.

    ``open_s`` tells for how many seconds the open step has been going on, ``threshold`` from how many on that is a stall; any
    thread may ask both. A step that hangs in a call which holds the interpreter's lock is seen from outside alone: that is what
    the agent's py-spy is for.
    """

    def __init__(self, folder: Path, rank: int, threshold: Callable[[], float], open_s: Callable[[], float]) -> None:
        self._folder, self._rank = folder, rank
        self._threshold, self._open_s = threshold, open_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(POLL_S)

    def _run(self) -> None:
        told = False
        while not self._closing.wait(POLL_S):
            stalled = self._open_s() > self._threshold()
            if stalled and not told:
                log.warning("the step of rank %d is stalled; what it does is in %s", self._rank, self._dump())
            told = stalled

    def _dump(self) -> str:
        try:
            return str(write_dump(self._folder, self._rank))
        except (OSError, RuntimeError) as error:
            return f"no file: {error}"


def write_dump(folder: Path, rank: int) -> Path:
    """A new folder with what this process is doing now; the oldest go beyond ``KEPT``. Raises ``OSError``."""
    mine = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-rank-{rank:05d}"
    mine.mkdir(parents=True, exist_ok=True)
    with open(mine / STACKS, "w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    if collectives := _collectives():
        (mine / COLLECTIVES).write_text(collectives)
    for old in sorted(folder.glob("*-rank-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return mine


def _collectives() -> str:
    """The flight recorder's dump as JSON; empty without a process group."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ""
    from torch._C import _distributed_c10d

    with contextlib.suppress(AttributeError):  # a private name of torch
        dump: bytes | str = _distributed_c10d._dump_fr_trace_json(True, False)  # type: ignore[attr-defined]
        return dump.decode() if isinstance(dump, bytes) else dump
    return ""
