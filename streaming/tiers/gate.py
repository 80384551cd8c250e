"""The way of ranks and loader workers to the shards that the node's prefetcher keeps ready for them.

A rank is a ``Member``: the first that finds no prefetcher starts it, and it ends with the last. Whoever reads steps, the rank
itself or each of its loader workers, has a ``Gate``: it asks for a step, and reads the shards once they are there. Where the
prefetcher dies, the members start another, which finds the shards that were there; the gates connect to it and ask again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import JsonDict, Record, ShardCounts
from outgrow.errors import OutgrowError, TrainingError
from outgrow.streaming.tiers.messages import Channel
from outgrow.streaming.tiers.rendezvous import connect, start_prefetcher, take_seat
from outgrow.streaming.tiers.slot import read_counts
from outgrow.streaming.tiers.slot_files import COUNTS

PATIENCE_S = 60.0
"""How long a prefetcher is waited for: that of another start of the run may be ending, a killed one is started again."""
_PAUSE_S = 0.05
_MAX_STARTS = 4
"""Prefetchers that may end, one after the other, before they answer; another is not tried."""


@dataclass(frozen=True, kw_only=True)
class Reads(Record):
    """The steps that a rank has still to read: reader k of its n every n-th from ``positions[k]`` on, below ``stop``."""

    positions: tuple[int, ...]
    stop: int


class Member:
    """A rank at the node's prefetcher, which lives as long as it has one; ``assignment`` is what one is started with.

    ``attempt`` names the start of the ranks, and ``local_world`` of them are on the node. ``reads`` is asked at once, and
    again where another prefetcher is started; None for one that reads no step. ``slot`` is the folder that the shards are
    copied to. Raises what keeps the prefetcher from its work (``DataError``, ``SiteError``, ``IntegrityError``), and
    ``TrainingError`` where none answers.
    """

    def __init__(
        self,
        folder: Path,
        assignment: bytes,
        *,
        rank: int,
        attempt: str,
        local_world: int = 1,
        reads: Callable[[], Reads] | None = None,
    ) -> None:
        self._folder = folder
        self._assignment = assignment
        self._hello = {"hello": "member", "rank": rank, "attempt": attempt, "local_world": local_world}
        self._reads = reads
        self._closed = threading.Event()
        self._channel, self.slot = self._join()
        self._thread = threading.Thread(target=self._stay, name="outgrow-prefetcher", daemon=True)
        self._thread.start()

    @property
    def counts_file(self) -> str:
        """Where ``counts`` reads."""
        return str(self.slot / COUNTS)

    def counts(self) -> ShardCounts | None:
        """What reading the run's shards has cost on this node; None where nothing was written of it yet."""
        return read_counts(self.slot)

    def close(self) -> None:
        self._closed.set()
        self._channel.close()
        self._thread.join()

    def _stay(self) -> None:
        """Joins again whenever the prefetcher is gone."""
        while not self._closed.is_set():
            try:
                self._channel.receive()  # nothing is ever sent: this waits for the end
            except EOFError:
                self._channel.close()
            if not self._closed.is_set():
                try:
                    self._channel, self.slot = self._join()
                except OutgrowError:
                    return  # the gates meet the same error, and their readers are told
        self._channel.close()  # a ``close`` that came while this joined has closed the one before

    def _join(self) -> tuple[Channel, Path]:
        starts = 0
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up and starts <= _MAX_STARTS and not self._closed.is_set():
            reads = {} if self._reads is None else {"reads": self._reads().to_dict()}
            met = _greet(self._folder, self._hello | reads)
            if met is not None:
                return met
            seat = take_seat(self._folder)
            if seat is not None:
                start_prefetcher(seat, self._assignment)
                starts += 1
            else:
                time.sleep(_PAUSE_S)  # another starts it, or it serves another start of the run, which is ending
        raise _nobody(self._folder)


class Gate:
    """Where one reader of a rank finds the shards of its steps. Reader ``reader`` takes its steps in ascending order.

    Every method raises what keeps the prefetcher from a shard: ``ShardError`` for one of the training rows that no place has
    whole, ``IntegrityError`` for one held out; and ``TrainingError`` where no prefetcher answers for a minute.
    """

    def __init__(self, folder: Path, *, rank: int, attempt: str, reader: int = 0) -> None:
        self._folder = folder
        self._hello = {"hello": "reader", "rank": rank, "attempt": attempt, "reader": reader}
        self._channel: Channel | None = None
        self._slot = Path()
        self._elsewhere: dict[str, Path] = {}
        self._step = 0

    def acquire(self, step: int) -> None:
        """Wait until every shard of a step can be read; ``path`` then tells where. Steps before it are left."""
        self._step = step
        self._ask({"ask": "step", "step": step})

    def release(self, step: int) -> None:
        """Leave a step: what only it and earlier ones needed may be deleted."""
        try:
            if self._channel is not None:
                self._channel.send({"ask": "left", "step": step})
        except EOFError:
            pass  # asking for the next step says as much

    def acquire_validation(self) -> None:
        """Wait until every shard of the held-out rows can be read; they stay as long as the prefetcher."""
        self._ask({"ask": "validation"})

    def path(self, name: str) -> Path:
        """Where the shard lies whose path below the store is ``name``."""
        return self._elsewhere.get(name) or self._slot / name

    def heal(self, stream: str, split: str, shard: int) -> None:
        """Have a shard whose copy is damaged or gone fetched again; ``path`` then tells where."""
        self._ask({"ask": "heal", "stream": stream, "split": split, "shard": shard, "step": self._step})

    def close(self) -> None:
        """Asking again opens it again."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _ask(self, message: JsonDict) -> None:
        for _ in range(_MAX_STARTS):
            channel = self._channel or self._connect()
            try:
                answer = channel.ask(message)
            except EOFError:
                self.close()
            else:
                self._elsewhere = {name: Path(path) for name, path in answer["elsewhere"].items()}
                return
        raise _nobody(self._folder)

    def _connect(self) -> Channel:
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            met = _greet(self._folder, self._hello)
            if met is not None:
                self._channel, self._slot = met
                return met[0]
            time.sleep(_PAUSE_S)
        raise _nobody(self._folder)


def _greet(folder: Path, hello: JsonDict) -> tuple[Channel, Path] | None:
    """A channel to the prefetcher and its slot; None where none answers, or one that serves another start of the run."""
    connection = connect(folder)
    if connection is None:
        return None
    channel = Channel(connection)
    try:
        answer = channel.ask(hello)
    except EOFError:
        answer = {}
    except OutgrowError:
        channel.close()
        raise
    if "slot" in answer:
        return channel, Path(answer["slot"])
    channel.close()
    return None


def _nobody(folder: Path) -> TrainingError:
    return TrainingError(
        "the process that fetches shards does not answer",
        where=str(folder),
        hint=f"it ends as soon as it starts (what it says is in the log), or one of another start of the run has not ended "
        f"within {PATIENCE_S:.0f} s",
    )
