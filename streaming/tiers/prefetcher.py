"""The prefetcher: one process a node and run that keeps the shards of the next steps in a slot of the first tier.

It is started by exec by a rank that finds none (``gate``), is told what to do through a pipe, and imports no torch. Ranks are
its members: it ends at once when the last is gone, however that went, as the kernel closes their sockets. Whatever it has
copied stays, and whoever reads the dataset next takes it over. Each connection has a thread of its own, which may wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from outgrow.contracts import DatasetCard, JsonDict, Record, RunRef, ShardCounts
from outgrow.recipes.schema.site import Site
from outgrow.streaming.steps import ReadPlan, open_indexes
from outgrow.streaming.tiers.copies import Copies
from outgrow.streaming.tiers.gate import Reads
from outgrow.streaming.tiers.messages import Channel, from_error
from outgrow.streaming.tiers.needs import Needs
from outgrow.streaming.tiers.places import open_places
from outgrow.streaming.tiers.rate import RateLimit
from outgrow.streaming.tiers.rendezvous import Seat
from outgrow.streaming.tiers.room import Room, number_windows, validation_shards
from outgrow.streaming.tiers.shard_list import ShardList
from outgrow.streaming.tiers.slot import Slot, read_counts, take_slot
from outgrow.streaming.tiers.slot_files import COUNTS
from outgrow.streaming.tiers.supply import Supply
from outgrow.streaming.tiers.traffic import Traffic
from outgrow.streaming.tiers.transfer import Fetcher

_PATIENCE_S = 30.0
"""How long a slot is waited for that a dying prefetcher of the same run still holds; and how long for a first member."""
_REGRETS_S = 2.0
"""How long one that cannot do its work stays, to tell all who ask."""
_DRAIN_S = 0.3
"""How long the readers of a rank that leaves are heard out: what they said last may not have been read yet."""
_TICK_S = 1.0
_BUSY: JsonDict = {"busy": True}
"""The answer to another start of the run than the one that is served."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment(Record):
    """What a prefetcher is told: what its run reads, at most ``max_rows`` held-out rows of each stream (0: all), and of which
    places of ``site``, by name.

    ``site`` holds secrets in clear; it goes through a pipe alone.
    """

    run: RunRef
    card: DatasetCard
    plan: ReadPlan
    max_rows: int
    holders: tuple[str, ...]
    site: JsonDict = dataclasses.field(repr=False)

    def encode(self) -> bytes:
        return json.dumps(self.to_dict()).encode()

    @classmethod
    def decode(cls, data: bytes) -> Assignment:
        return cls.from_dict(json.loads(data))


def serve(folder: str, lock: int, listener: int, assignment: int) -> None:
    """Main of a prefetcher: ``folder`` is where it is met, the others are the descriptors that it was handed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(assignment, "rb") as pipe:
        told = Assignment.decode(pipe.read())
    _Server(Seat(Path(folder), lock, socket.socket(fileno=listener)), told).run()


class _Server:
    """Answers whoever connects to the seat. Members are told apart by numbers, and all of one start of the run."""

    def __init__(self, seat: Seat, told: Assignment) -> None:
        self._seat = seat
        self._told = told
        self._lock = threading.Condition()
        self._readers: Counter[int] = Counter()
        self._members: dict[int, str] = {}
        self._numbers = itertools.count()
        self._supply: Supply | None = None
        self._slot: Slot | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Never returns: the process ends with the last member, or when none comes."""
        try:
            self._slot, self._supply = _open_supply(self._told)
            threading.Thread(target=self._look_after, name="tick", daemon=True).start()
        except Exception as error:
            self._error = error
        self._seat.listener.settimeout(_PATIENCE_S if self._error is None else _REGRETS_S)
        while True:
            try:
                connection, _ = self._seat.listener.accept()
            except TimeoutError:
                with self._lock:
                    self._end_without_members()
            else:
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        channel = Channel(connection)
        with contextlib.suppress(EOFError), contextlib.closing(channel):
            hello = channel.receive()
            if self._supply is None or self._slot is None:
                assert self._error is not None
                channel.send({"error": from_error(self._error)})
            elif hello["hello"] == "member":
                self._serve_member(channel, connection, hello, self._supply, {"slot": str(self._slot.folder)})
            elif self._has_member_of(hello["attempt"]):
                channel.send({"slot": str(self._slot.folder)})
                with self._one_reader_more(hello["rank"]):
                    _serve_reader(channel, hello["rank"], hello["reader"], self._supply)
            else:
                channel.send(_BUSY)

    def _serve_member(
        self, channel: Channel, connection: socket.socket, hello: JsonDict, supply: Supply, welcome: JsonDict
    ) -> None:
        with self._lock:
            if set(self._members.values()) - {hello["attempt"]}:
                channel.send(_BUSY)
                return
            number = next(self._numbers)
            self._members[number] = hello["attempt"]
        try:
            if "reads" in hello:
                supply.join(hello["rank"], number, hello["local_world"], Reads.from_dict(hello["reads"]))
            channel.send(welcome)
            _wait_for_end(connection)
        except EOFError:
            pass
        except Exception as error:
            with contextlib.suppress(EOFError):
                channel.send({"error": from_error(error)})
        finally:
            if "reads" in hello:
                with self._lock:
                    self._lock.wait_for(lambda: not self._readers[hello["rank"]], _DRAIN_S)
                supply.leave(hello["rank"], number)
            with self._lock:
                del self._members[number]
                self._end_without_members()

    def _has_member_of(self, attempt: str) -> bool:
        with self._lock:
            return attempt in self._members.values()

    @contextlib.contextmanager
    def _one_reader_more(self, rank: int) -> Iterator[None]:
        with self._lock:
            self._readers[rank] += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[rank] -= 1
                self._lock.notify_all()

    def _look_after(self) -> None:
        assert self._supply is not None
        while True:
            time.sleep(_TICK_S)
            self._supply.tick()
            with self._lock:
                self._write_counts()

    def _write_counts(self) -> None:
        """A full disk takes no note of them; the next time it may. The lock is held."""
        assert self._slot is not None and self._supply is not None
        aside = self._slot.folder / f"{COUNTS}.new"
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps(self._supply.counts().to_dict()))
            aside.replace(self._slot.folder / COUNTS)

    def _end_without_members(self) -> None:
        """End the process where no member is left; the lock is held, so that none comes meanwhile."""
        if self._members:
            return
        if self._slot is not None:
            self._write_counts()
            self._slot.close()
        self._seat.clear()
        os._exit(0)  # threads may be in the middle of a fetch, which the next one takes up


def _serve_reader(channel: Channel, rank: int, reader: int, supply: Supply) -> None:
    """Answer one reader until it is gone."""
    while True:
        message = channel.receive()
        try:
            match message["ask"]:
                case "left":
                    supply.release(rank, reader, message["step"])
                    continue
                case "step":
                    elsewhere = supply.acquire(rank, reader, message["step"])
                case "validation":
                    elsewhere = supply.acquire_pinned()
                case _:
                    elsewhere = supply.heal(message["stream"], message["split"], message["shard"], message["step"])
        except Exception as error:
            channel.send({"error": from_error(error)})
        else:
            channel.send({"elsewhere": {name: str(path) for name, path in elsewhere.items()}})


def _wait_for_end(connection: socket.socket) -> None:
    """Returns once a member has closed its end, or is dead: a process that it forked may keep its end open."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(connection, select.POLLIN)  # a member has nothing to say, so this is its end
        poll.register(process, select.POLLIN)
        poll.poll()
    finally:
        os.close(process)


def _open_supply(told: Assignment) -> tuple[Slot, Supply]:
    """The slot, taken, and what keeps it filled. Raises ``DataError``, ``SiteError`` or ``IntegrityError`` where there is no
    room or no dataset."""
    hot, *others = open_places(Site.model_validate(told.site))
    holders = [place for place in (hot, *others) if place.name in told.holders]
    indexes = open_indexes(told.plan)
    shards = ShardList.open(Path(told.plan.store), [stream.name for stream in indexes[0].facts.train])
    pinned = validation_shards(indexes[0], shards, told.max_rows)
    windows = number_windows(shards, indexes[0].facts.window_shards)

    def divide(total: int) -> Room:
        return Room.divide(total, shards, windows, pinned)

    run = PurePosixPath(told.run.folder).name
    slot = take_slot(
        hot,
        told.card.store,
        run=run,
        dataset_bytes=int(shards.num_bytes.sum()),
        smallest=divide(0).smallest,
        patience_s=_PATIENCE_S,
    )
    counts = read_counts(slot.folder) or ShardCounts(run=run)
    limit = hot.tier.limit_bytes_per_s
    limiter = RateLimit(limit) if limit else None
    fetcher = Fetcher(holders, told.card.store, traffic=Traffic(counts.tiers), limiter=limiter)
    supply = Supply(
        Needs(indexes, told.plan.mix, told.plan.seed, shards),
        Copies(shards, slot, fetcher, holders, told.card.store),
        windows=windows,
        divide=divide,
        pinned=pinned,
        present=tuple(slot.present(shards)),
        reserve_bytes=hot.tier.reserve_bytes,
        parallel=holders[0].tier.num_parallel,
        counts=counts,
    )
    return slot, supply
