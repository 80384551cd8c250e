"""Shards and files from one place to another: by ranges, resumable, digested, bounded in time, limited in rate."""

from __future__ import annotations

import errno
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from outgrow import retry
from outgrow.errors import IntegrityError, OutgrowError, SiteError
from outgrow.retry import PASSING, Kind, Patience, Unreachable
from outgrow.storage import BLOCK_BYTES, Storage, sync_folder
from outgrow.streaming.tiers.blocks import Pace, check_name, open_blocks
from outgrow.streaming.tiers.copy_and_check import copy_to_bucket, copy_to_disk, source_digest
from outgrow.streaming.tiers.partial import PartialFile, PartialPath
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.rate import RateLimit
from outgrow.streaming.tiers.shard_list import ShardFile
from outgrow.streaming.tiers.traffic import Traffic

T = TypeVar("T")

GIVE_UP_S = 600.0
"""How long a place is asked again that cannot be reached or gives no byte more."""
_WHOLE_READS = 2
"""Times that all of a file is read of one place; bytes that differ from the digest may have changed on the way."""


class Corrupt(IntegrityError):
    """No place has the file whole: each has it with other bytes, or not at all."""


class _Failure(Exception):
    """An attempt to read of one place failed: its kind, and what it is in words."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


class Fetcher:
    """Copies shards of the store ``store`` (a key, the same in every place) from the first of ``holders`` that has them whole.

    A place with a limit is read at no more than that by all threads together; ``limiter`` is of what is written to. Several
    threads may fetch at once, each another file. ``traffic`` counts.
    """

    def __init__(
        self,
        holders: Sequence[Place],
        store: str,
        *,
        traffic: Traffic | None = None,
        limiter: RateLimit | None = None,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self.traffic = traffic or Traffic()
        self._holders = tuple(_Holder(place, store, self.traffic, limiter) for place in holders)
        self._store = store
        self._patience = Patience(total_s=give_up_s)

    def fetch(self, file: ShardFile, to: Path) -> str:
        """The name of the place that it came from; ``to`` then holds it whole, or is as it was.

        What has arrived lies beside it in a file whose name ends with ``PART``, and is taken up by the next call. Raises
        ``Corrupt`` where no place has it whole, ``Unreachable`` where that could not be told for ``give_up_s`` without a byte
        more, ``SiteError`` where access is denied, ``DataError`` for a name that leads out of the store, and ``OSError``
        (``ENOSPC`` among them) where ``to`` cannot be written.
        """
        check_name(file.name)
        with PartialPath(to) as path:
            place = self._fill(file, PartialFile(path.fd))
            path.commit()
        return place

    def fetch_into(self, file: ShardFile, fd: int) -> str:
        """As ``fetch``, into an open file of no name of its own, such as a memfd."""
        check_name(file.name)
        return self._fill(file, PartialFile(fd))

    def _fill(self, file: ShardFile, part: PartialFile) -> str:
        part.take_up(file.num_bytes)
        if part.size == file.num_bytes and part.digest() == file.sha256:
            return ""
        failures: dict[str, _Failure] = {}
        damaged: Counter[str] = Counter()
        gained, attempt = time.monotonic(), 0
        while True:
            for holder in self._holders:
                if holder.name in failures and failures[holder.name].kind not in PASSING:
                    continue
                before = part.size
                try:
                    holder.read_whole(file, part, damaged)
                    return holder.name
                except _Failure as failure:
                    failures[holder.name] = failure
                if part.size > before:
                    gained, attempt = time.monotonic(), 0
            delay_s = None
            if any(failure.kind in PASSING for failure in failures.values()):
                delay_s = self._patience.next_delay(attempt, time.monotonic() - gained, random.random())
            if delay_s is None:
                raise _verdict(f"{self._store}/{file.name}", failures, time.monotonic() - gained)
            time.sleep(delay_s)
            attempt += 1


def _verdict(where: str, failures: Mapping[str, _Failure], tried_s: float) -> OutgrowError:
    """What is wrong when no place is left to ask, or no time."""
    kinds = {failure.kind for failure in failures.values()}
    told = "; ".join(f"{name}: {failure.text}" for name, failure in failures.items()) or "no place is known to hold it"
    if kinds <= {"corrupt", "missing", "io"}:
        hint = "outgrow data verify shows what is damaged; a whole copy of it, put in its place, mends it"
        return Corrupt(f"no place has the file whole: {told}", where=where, hint=hint)
    if "denied" in kinds and not kinds & PASSING:
        return SiteError(f"cannot be read: {told}", where=where, hint=retry.CREDENTIALS_HINT)
    return Unreachable(
        f"cannot be read, tried for {tried_s:.0f} s: {told}",
        where=where,
        hint="check the disk or the network; the same command goes on where this one stopped",
    )


class _Holder:
    """One place to read of, with what all threads share of it."""

    def __init__(self, place: Place, store: str, traffic: Traffic, limiter: RateLimit | None) -> None:
        self.name = place.name
        self._place = place
        self._store = store
        self._traffic = traffic
        limit = place.tier.limit_bytes_per_s
        self._limiters = [each for each in (RateLimit(limit) if limit else None, limiter) if each is not None]
        self._pace = Pace()

    def read_whole(self, file: ShardFile, part: PartialFile, damaged: Counter[str]) -> None:
        """Read what ``part`` lacks; from the beginning again where the whole turns out wrong.

        ``damaged`` counts the reads of this file that were, by place. Raises ``_Failure`` for what is wrong with the place, and
        ``OSError`` where ``part`` cannot be written.
        """
        while wrong := self._read_rest(file, part):
            # Bytes that came from elsewhere, or lay there before, say nothing against this place.
            if part.places <= {self.name}:
                damaged[self.name] += 1
                self._traffic.failed(self.name, "corrupt")
            part.restart()
            if damaged[self.name] == _WHOLE_READS:
                raise _Failure("corrupt", f"{wrong}, read {_WHOLE_READS} times")
        self._traffic.shard_read(self.name)

    def _read_rest(self, file: ShardFile, part: PartialFile) -> str:
        """What is wrong with the whole; empty where nothing is."""
        with ExitStack() as stack:
            blocks = self._ask(lambda: stack.enter_context(open_blocks(self._place, self._store, file.name, self._pace)))
            while part.size < file.num_bytes:
                start, stop = part.size, min(part.size + BLOCK_BYTES, file.num_bytes)
                block = self._ask(partial(blocks.read, start, stop))
                if not block:
                    return f"it ends after {start:,} of {file.num_bytes:,} bytes"
                self._traffic.bytes_read(self.name, len(block))
                for limiter in self._limiters:
                    limiter.take(len(block))
                part.append(block, self.name)
            if self._ask(partial(blocks.too_long, file.num_bytes)):
                return f"it is longer than {file.num_bytes:,} bytes"
        return "" if part.digest() == file.sha256 else "the bytes differ from their digest"

    def _ask(self, action: Callable[[], T]) -> T:
        """What a read returns; its errors are told apart from those of the file that is written."""
        try:
            with self._traffic.reading(self.name):
                return action()
        except Exception as error:
            failure = self._failure(error)
            self._traffic.failed(self.name, failure.kind)
            raise failure from None

    def _failure(self, error: Exception) -> _Failure:
        kind, text = retry.kind_of(error), retry.describe(error)
        if self._place.is_local:
            store = self._place.storage.path(self._store)
            if not os.path.isdir(store):
                return _Failure("unreachable", f"there is no {store} any more")
            if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EINVAL):
                return _Failure("corrupt", "it is a link, or no regular file")
        return _Failure(kind, text)


def copy_verified(
    source: Storage,
    key: str,
    target: Storage,
    target_key: str,
    *,
    expected: str | None,
    limiter: RateLimit | None,
    on_bytes: Callable[[int], None],
) -> str:
    """sha256 of a file that was copied from one storage to another and read back there.

    On a local target the file grows under a name that ends with ``partial.PART``, which the next call takes up; it is synced
    piece by piece and read back from the disk, not from memory, while the next piece is copied, and renamed when it is whole.
    ``on_bytes`` is told how many bytes more are copied. Raises ``IntegrityError``, and leaves no file, where what the target
    holds differs from ``expected`` or, where that is None, from what was read; ``OSError`` where a disk is full or broken.
    """

    def moved(num_bytes: int) -> None:
        on_bytes(num_bytes)
        if limiter is not None:
            limiter.take(num_bytes)

    if not target.is_local:
        read, back = copy_to_bucket(source, key, target, target_key, moved=moved)
        if back != (expected or read):
            target.remove(target_key)
            raise _differs(source, key, target, target_key, expected)
        return back
    path = Path(target.path(target_key))
    with PartialPath(path) as part:
        resumed = os.fstat(part.fd).st_size > 0
        read, back = copy_to_disk(source, key, part, digest_source=expected is None, moved=moved)
        if resumed and back != (expected or read):
            # What an earlier attempt left may be what is wrong: after a power cut, say.
            os.ftruncate(part.fd, 0)
            read, back = copy_to_disk(source, key, part, digest_source=expected is None, moved=moved)
        if back != (expected or read):
            part.discard()
            raise _differs(source, key, target, target_key, expected)
        os.fsync(part.fd)
        part.commit()
    sync_folder(path.parent)
    return back


def _differs(source: Storage, key: str, target: Storage, target_key: str, expected: str | None) -> IntegrityError:
    """Which side is at fault, found by reading the source once more."""
    if expected is not None and source_digest(source, key) != expected:
        return IntegrityError("the bytes differ from their digest", where=f"{source.root_url}/{key}")
    return IntegrityError("what was read back differs from what was written", where=f"{target.root_url}/{target_key}")
