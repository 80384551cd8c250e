"""Whole copies of kept folders, made and removed: each file verified before the copy counts, originals only ever read.

On a disk the files of a new copy lie aside in ``<tier>/placing/`` and are renamed into place. On a bucket, and where a damaged
copy is repaired, they lie under their key; the marker is removed first and comes last. What an interrupted copy finished is
read again and kept. One process at a time writes to a tier.
"""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from outgrow.errors import DataError, IntegrityError, OutgrowError, UserError
from outgrow.recipes.placed import COPY_MARK, PLACING, Kind, Placed, PlacedFile, claim_key, record_key
from outgrow.storage import sync_tree
from outgrow.streaming.manifest import MARKER
from outgrow.streaming.tiers.contents import Contents, FileFacts, holds, stored_sizes
from outgrow.streaming.tiers.partial import PART
from outgrow.streaming.tiers.placement import OUTSIDE, Copy, Item, removal_refusal
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.rate import RateLimit
from outgrow.streaming.tiers.slot import tier_folder
from outgrow.streaming.tiers.slot_room import shown
from outgrow.streaming.tiers.stock import Shelves, Source, Stock, aside_key, promised_bytes
from outgrow.streaming.tiers.transfer import copy_verified

Result: TypeAlias = Literal["copied", "there", "gone", "damaged", "full", "refused", "failed"]
"""``gone``: the source was removed or replaced meanwhile, as old checkpoints are; ``full``: the target has no room left."""

FINE: frozenset[Result] = frozenset({"copied", "there", "gone"})
"""Results that need nobody's attention."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a copy: ``message`` in words where it was not made; ``num_bytes`` of it and ``seconds`` that it took."""

    copy: Copy
    result: Result
    message: str = ""
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """A copy that is being made: its files go below ``prefix`` of the place."""

    place: Place
    key: str
    prefix: str
    sources: tuple[Source, ...]
    promised_bytes: int

    @property
    def contents(self) -> Contents:
        return self.sources[0].contents


class Placer:
    """Makes and removes copies.

    ``limit_bytes_per_s`` holds together with the limits of both places. ``locks`` is a local folder for the locks of buckets.
    ``on_bytes`` is told of bytes as they are copied, by several threads, ``on_wait`` of a place that another process writes to.
    """

    def __init__(
        self,
        shelves: Shelves,
        *,
        locks: Path,
        limit_bytes_per_s: float | None = None,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
        on_wait: Callable[[str], None] = lambda place: None,
    ) -> None:
        self._shelves = shelves
        self._locks = locks
        self._limit = limit_bytes_per_s
        self._on_bytes = on_bytes
        self._on_wait = on_wait
        self._claiming = threading.Lock()
        self._stop = threading.Event()

    def place(self, copy: Copy) -> Outcome:
        """Make the copy, unless it is there by now. What stands in its way is the outcome; nothing else is stopped by it."""
        start = time.monotonic()
        try:
            with self._alone(self._shelves.place(copy.target)):
                num_bytes = self._place(copy)
        except _Gone as error:
            return Outcome(copy=copy, result="gone", message=str(error))
        except IntegrityError as error:
            return Outcome(copy=copy, result="damaged", message=str(error))
        except UserError as error:
            return Outcome(copy=copy, result="refused", message=str(error))
        except OSError as error:
            result: Result = "full" if _is_full(error) else "failed"
            return Outcome(copy=copy, result=result, message=error.strerror or str(error))
        except OutgrowError as error:
            return Outcome(copy=copy, result="failed", message=str(error))
        if num_bytes is None:
            return Outcome(copy=copy, result="there")
        return Outcome(copy=copy, result="copied", num_bytes=num_bytes, seconds=time.monotonic() - start)

    def remove(self, kind: Kind, key: str, name: str) -> None:
        """Delete the copy of a folder in a place, or what was begun of one.

        Raises ``DataError`` for an original, for the last whole one, and where something lies in it that outgrow did not copy.
        """
        place = self._shelves.place(name)
        # Of two copies, each whole as long as the other is not removed, one stays.
        with self._locked(self._locks / "removing", name), self._alone(place):
            item = self._shelves.item(kind, key)  # as it is now: another process may have been waited for
            if self._shelves.claim(place, key) is not None and self._shelves.record(place, key) is None:
                self._discard(place, key)
                return
            refusal = removal_refusal(item, name)
            if refusal:
                raise DataError(refusal, where=place.storage.root_url)
            try:
                contents = self._shelves.open(kind, key, name).contents
            except (FileNotFoundError, IntegrityError, DataError):  # what it is a copy of says what is in it
                other = next(holding.place for holding in item.whole if holding.place != name)
                contents = self._shelves.open(kind, key, other).contents
            self._delete(place, key, contents)

    def tidy(self, stock: Stock) -> list[str]:
        """Remove what was begun of folders that are nowhere any more, and records of copies that are gone; says what.

        Nothing is removed while a place does not answer: the folders may lie there. On a bucket what was begun lies where
        an original would, so that it is only named.
        """
        if any(room.problem for room in stock.rooms.values()):
            return []
        known = {item.key: item for item in stock.items}
        words = []
        for place in self._shelves.places:
            claims = [claim for claim in self._shelves.claims(place) if _is_over(claim, known.get(claim.key), place)]
            gone = [
                record.key
                for record in self._shelves.records(place)
                if record.key not in known or known[record.key].at(place.name) is None
            ]
            if claims or gone:
                with self._alone(place):
                    for claim in claims:
                        begun = f"{claim.key} was begun on {place.name}, and is nowhere any more"
                        if claim.key in known:
                            place.storage.remove(claim_key(claim.key))
                        elif place.is_local:
                            self._discard(place, claim.key)
                            words.append(f"{begun}: removed")
                        else:
                            words.append(f"{begun}: outgrow data place --remove {claim.key} --from {place.name} deletes it")
                    for key in gone:
                        if self._shelves.claim(place, key) is None and not stored_sizes(place.storage, key):
                            place.storage.remove(record_key(key))
        return words

    # --- one copy -----------------------------------------------------------------------------------------------------

    def _place(self, copy: Copy) -> int | None:
        """Bytes of the copy that was made; None where it was there."""
        target = self._shelves.place(copy.target)
        sources = self._sources(copy)
        contents = sources[0].contents
        there = self._shelves.holding(target, copy.kind, copy.key)
        if there is not None and there.copied and not there.problem and there.version == contents.digest and not copy.repair:
            target.storage.remove(claim_key(copy.key))  # of one that was killed just before it did this
            return None
        if there is not None and not there.copied:
            raise DataError(f"an original lies on {target.name}; it is left alone", where=self._where(target, copy.key))
        if there is not None and there.version not in ("", contents.digest):
            self._delete(target, copy.key, self._shelves.open(copy.kind, copy.key, target.name).contents)
        work = self._begin(copy, target, sources)
        try:
            self._fill(work)
        except IntegrityError:
            self._check_unchanged(copy, work)
            raise
        self._check_unchanged(copy, work)
        num_bytes = sum(stored_sizes(target.storage, work.prefix).values())
        self._commit(copy, work, num_bytes)
        return num_bytes

    def _sources(self, copy: Copy) -> tuple[Source, ...]:
        """The sources that are of the same version as the first that can be opened, that one first."""
        opened: list[Source] = []
        wrong: Exception | None = None
        for name in copy.sources:
            try:
                opened.append(self._shelves.open(copy.kind, copy.key, name))
            except FileNotFoundError:
                continue
            except (IntegrityError, DataError, OSError) as error:
                wrong = error
        if not opened:
            raise wrong or _Gone(f"{copy.key} is gone")
        return tuple(source for source in opened if source.contents.digest == opened[0].contents.digest)

    def _begin(self, copy: Copy, target: Place, sources: tuple[Source, ...]) -> Work:
        """Claim the copy, and say where its files go. Raises ``DataError`` where something else lies there."""
        storage, key, contents = target.storage, copy.key, sources[0].contents
        claim, record = self._shelves.claim(target, key), self._shelves.record(target, key)
        found = stored_sizes(storage, key)
        if found and (COPY_MARK not in found or (record is None and (claim is None or target.is_local))):
            raise DataError(
                "something lies there that outgrow did not copy",
                where=self._where(target, key),
                hint="move it away, or finish what is being made there",
            )
        if claim is None or claim.digest != contents.digest:
            storage.remove(aside_key(key))
            claim = Placed(
                key=key,
                kind=copy.kind,
                bytes=copy.num_bytes,
                source=self._said(copy),
                digest=contents.digest,
                time=time.time(),
                files=record.files if record is not None and record.digest == contents.digest else {},
            )
            storage.write_json(claim_key(key), claim.to_dict())
        prefix = aside_key(key) if target.is_local and not found else key
        storage.write(f"{prefix}/{COPY_MARK}", b"made by outgrow data place\n")
        if found:
            storage.remove(f"{key}/{MARKER}")
            for name in set(record.files if record is not None else ()) - set(contents.files):
                storage.remove(f"{key}/{name}")
        return Work(place=target, key=key, prefix=prefix, sources=sources, promised_bytes=promised_bytes(target))

    def _fill(self, work: Work) -> None:
        """Every file of the copy in its place, verified. Raises ``IntegrityError`` for one that no source has whole."""
        source = work.sources[0].name
        tiers = [work.place.tier, *([self._shelves.place(source).tier] if source != OUTSIDE else [])]
        limits = [limit for limit in (self._limit, *(tier.limit_bytes_per_s for tier in tiers)) if limit is not None]
        limiter = RateLimit(min(limits)) if limits else None
        room = _DiskRoom(work)
        sizes = stored_sizes(work.place.storage, work.prefix)
        with ThreadPoolExecutor(max(tier.num_parallel for tier in tiers)) as pool:
            jobs = [
                pool.submit(self._bring, work, name, facts, sizes.get(name), room, limiter)
                for name, facts in work.contents.files.items()
            ]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()
                raise

    def _bring(
        self, work: Work, name: str, facts: FileFacts, size: int | None, room: _DiskRoom, limiter: RateLimit | None
    ) -> None:
        """One file of the copy: kept where an earlier attempt left it whole, else copied."""
        storage, key = work.place.storage, f"{work.prefix}/{name}"
        facts = self._with_claimed(work, name, facts)
        if size is not None and holds(storage, key, facts, size):
            return
        errors: list[Exception] = []
        for source in (source for source in work.sources if name in source.sizes):
            origin, origin_key = source.files[name]
            try:
                with room.taking(source.sizes[name]):
                    sha256 = copy_verified(
                        origin, origin_key, storage, key, expected=facts.sha256, limiter=limiter, on_bytes=self._tell
                    )
                if facts.chunks and not holds(storage, key, facts, source.sizes[name]):
                    raise IntegrityError("the bytes differ from their digest", where=f"{origin.root_url}/{origin_key}")
            except (IntegrityError, OSError) as error:
                if _is_full(error):
                    raise
                errors.append(error)
            else:
                if facts.sha256 is None and not facts.chunks:
                    self._write_down(work, name, PlacedFile(num_bytes=source.sizes[name], sha256=sha256))
                return
        storage.remove(key)
        unread = [error for error in errors if not isinstance(error, IntegrityError | FileNotFoundError)]
        if unread:
            raise unread[0]  # it may be whole there
        damaged = next((error for error in errors if isinstance(error, IntegrityError)), None)
        raise damaged or IntegrityError("the file is missing", where=f"{work.key}/{name}")

    def _with_claimed(self, work: Work, name: str, facts: FileFacts) -> FileFacts:
        """What is known of a file, by an earlier attempt where nothing else says it."""
        if facts.sha256 is not None or facts.chunks:
            return facts
        claim = self._shelves.claim(work.place, work.key)
        read = claim.files.get(name) if claim is not None else None
        return facts if read is None else replace(facts, sha256=read.sha256)

    def _write_down(self, work: Work, name: str, file: PlacedFile) -> None:
        """Add to the claim what was read of a file that no manifest vouches for."""
        with self._claiming:
            claim = self._shelves.claim(work.place, work.key)
            assert claim is not None, "the claim was written before the first file"
            claim = replace(claim, files={**claim.files, name: file})
            work.place.storage.write_json(claim_key(work.key), claim.to_dict())

    def _check_unchanged(self, copy: Copy, work: Work) -> None:
        """Raise ``_Gone`` where the source is another one by now: its files may be of both."""
        try:
            now = self._shelves.open(copy.kind, copy.key, work.sources[0].name).contents.digest
        except FileNotFoundError:
            now = ""
        if now != work.contents.digest:
            self._discard(work.place, work.key)
            raise _Gone(f"{copy.key} was removed or replaced while it was copied")

    def _commit(self, copy: Copy, work: Work, num_bytes: int) -> None:
        """Make the copy count. The record comes before it: a copy without one would pass for an original."""
        place, storage = work.place, work.place.storage
        claim = self._shelves.claim(place, work.key)
        assert claim is not None, "the claim goes last"
        files = {
            name: claim.files.get(name) or PlacedFile(num_bytes=facts.num_bytes or 0, sha256=facts.sha256 or "")
            for name, facts in work.contents.files.items()
            if not work.contents.has_marker
        }
        if place.is_local:
            sync_tree(place.folder / work.prefix)
        storage.write_json(record_key(work.key), replace(claim, bytes=num_bytes, time=time.time(), files=files).to_dict())
        if work.contents.has_marker:
            storage.write(f"{work.prefix}/{MARKER}", f"{work.contents.digest}\n".encode())
        if work.prefix != work.key:
            storage.rename(work.prefix, work.key)
        storage.remove(claim_key(work.key))

    # --- what is deleted ----------------------------------------------------------------------------------------------

    def _delete(self, place: Place, key: str, contents: Contents) -> None:
        """Delete a copy of ``contents``: its marker first, its record last. Raises ``DataError`` where more lies in it."""
        storage, record = place.storage, self._shelves.record(place, key)
        expected = {*contents.files, MARKER, COPY_MARK, *(record.files if record is not None else ())}
        found = stored_sizes(storage, key)
        strange = [name for name in found if name.removesuffix(PART) not in expected]
        if strange:
            raise DataError(
                f"{len(strange)} files lie in it that outgrow did not copy, such as {ascii(strange[0])}; nothing is deleted",
                where=self._where(place, key),
                hint="move them away",
            )
        # Whatever is left when this is killed still has the mark, and so is still known as outgrow's.
        storage.remove(f"{key}/{MARKER}")
        for name in {name.partition("/")[0] for name in found} - {COPY_MARK}:
            storage.remove(f"{key}/{name}")
        storage.remove(key)
        storage.remove(aside_key(key))
        storage.remove(claim_key(key))
        storage.remove(record_key(key))

    def _discard(self, place: Place, key: str) -> None:
        """Remove what was begun of a new copy, then its claim; a copy that is being repaired stays as it is."""
        storage = place.storage
        storage.remove(aside_key(key))
        if self._shelves.record(place, key) is None:
            if not place.is_local and not place.holds(key):
                storage.remove(key)
            storage.remove(claim_key(key))

    # --- who is at it -------------------------------------------------------------------------------------------------

    def _alone(self, place: Place) -> AbstractContextManager[None]:
        """Holds the lock of a place."""
        lock = tier_folder(place) / PLACING / ".lock" if place.is_local else self._locks / f"{PLACING}-{place.name}"
        return self._locked(lock, place.name)

    @contextmanager
    def _locked(self, lock: Path, name: str) -> Iterator[None]:
        """Holds a lock among the processes of this machine, for a change of the place ``name``; the kernel frees it when its
        holder dies."""
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._on_wait(name)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _tell(self, num_bytes: int) -> None:
        """Say how far it is; ends the thread that says it where the others have ended."""
        if self._stop.is_set():
            raise _Gone("stopped")
        self._on_bytes(num_bytes)

    def _where(self, place: Place, key: str) -> str:
        return f"{place.storage.root_url}/{key}"

    def _said(self, copy: Copy) -> str:
        """Where a copy comes from; of weights, the folder of the original, also where they come from another copy."""
        name = copy.sources[0]
        record = None if name == OUTSIDE else self._shelves.record(self._shelves.place(name), copy.key)
        return record.source if record is not None and copy.kind == "weights" else self._shelves.location(copy.key, name)


def _is_over(claim: Placed, item: Item | None, place: Place) -> bool:
    """Whether nothing can come of a copy that was begun: what it is of is nowhere any more, or it was all but finished."""
    there = None if item is None else item.at(place.name)
    return item is None or (there is not None and there.copied and not there.problem and there.version == claim.digest)


def _is_full(error: Exception) -> bool:
    """Whether a disk has no room left for what is written."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _DiskRoom:
    """What a disk has left while several threads write to it; a bucket has no end."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._coming = 0

    @contextmanager
    def taking(self, num_bytes: int) -> Iterator[None]:
        """Room for a file of so many bytes while it is written. Raises ``OSError`` (``ENOSPC``) where there is none."""
        place = self._work.place
        with self._lock:
            free = place.storage.free_bytes()
            kept = place.tier.reserve_bytes + self._work.promised_bytes
            if free is not None and free - self._coming - kept < num_bytes:
                raise OSError(
                    errno.ENOSPC,
                    f"{place.name} has {shown(free)} free, of which {shown(kept)} are kept free; "
                    "the same command goes on once there is room",
                )
            self._coming += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._coming -= num_bytes


class _Gone(Exception):
    """The source is not there any more, or is another one."""
