"""The files of a run's record: ``events.jsonl``, which grows, and the full ones before it, ``events-000001.jsonl`` and so on.

At every moment, that of a kill included, each line stands in exactly one place for a reader. On a local folder a full file
is renamed. On a bucket, which cannot rename, the content is put under its number, and only then does ``events.jsonl`` begin
anew: it says in its first line which number it will get, so that what has that number already is not read twice. Together the
files stay below a bound by thinning, the older the more: steps alone, never another kind of record.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any, Protocol

from outgrow.contracts import JsonDict
from outgrow.storage import Storage

LIVE = "events.jsonl"
SEGMENT_BYTES = 16 << 20
OBJECT_SEGMENT_BYTES = 4 << 20
"""On a bucket the live file is put whole again and again."""
TOTAL_BYTES = 256 << 20
_TAIL_BYTES = 1 << 16
_SEGMENT = re.compile(r"events-(\d{6,})\.jsonl")
_STEP = b'{"kind":"step"'
"""How the line of a step begins: ``kind`` is the first field of a record."""


def line_of(value: JsonDict) -> bytes:
    """One line of the file. Raises ``TypeError`` or ``ValueError`` for what is no JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def note_line(dropped: int, **values: Any) -> bytes:
    """A line that is no record: how many were dropped, and what else a reader of the file should know."""
    return line_of({"dropped_records": dropped, **values})


def segment_name(number: int) -> str:
    return f"events-{number:06d}.jsonl"


def numbers_of(names: Sequence[str]) -> list[int]:
    """The numbers of the full files among ``names``, the oldest first."""
    return sorted(int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match)


def thinned(data: bytes) -> bytes:
    """Every second step left out, from the first on; all other lines as they are."""
    kept, steps = [], 0
    for line in data.splitlines(keepends=True):
        if line.startswith(_STEP):
            steps += 1
            if steps % 2:
                continue
        kept.append(line)
    return b"".join(kept)


def next_to_thin(sizes: Sequence[int]) -> int:
    """Which of the files, the oldest first, is to be thinned: so that what is twice as old is kept half as densely."""
    ages = range(len(sizes), 0, -1)
    return max(range(len(sizes)), key=lambda at: sizes[at] * ages[at])


class Bound:
    """Keeps the full files of a folder below ``TOTAL_BYTES``. One writer alone may hold it."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        self._bare: set[int] = set()
        """Those that hold nothing any more that could be left out."""

    def apply(self) -> None:
        """Thin as often as it takes; each file is replaced whole or not at all."""
        sizes = self._storage.sizes(self._folder)
        known = {number: sizes[segment_name(number)] for number in numbers_of(list(sizes))}
        while sum(known.values()) > TOTAL_BYTES:
            open_ = [number for number in known if number not in self._bare]
            if not open_:
                return
            number = open_[next_to_thin([known[number] for number in open_])]
            key = f"{self._folder}/{segment_name(number)}"
            before = self._storage.read(key)
            after = thinned(before)
            if len(after) == len(before):
                self._bare.add(number)
                continue
            self._storage.write(key, after)
            known[number] = len(after)


class Sink(Protocol):
    """Where lines go, in order. ``append`` takes all of ``data``, or raises and takes none; after ``last`` nothing comes."""

    def append(self, data: bytes, *, last: bool) -> None: ...


def open_sink(storage: Storage, folder: str, upload_interval_s: float) -> Sink:
    return LocalSink(storage, folder) if storage.is_local else ObjectSink(storage, folder, upload_interval_s)


class LocalSink:
    """Lines at the end of a local file."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        self._path = Path(storage.path(f"{folder}/{LIVE}"))
        self._bound = Bound(storage, folder)
        self._whole = self._tidied = False

    def append(self, data: bytes, *, last: bool) -> None:
        if not self._tidied:
            self._tidy()
        if not data:
            return
        with open(self._path, "ab+", buffering=0) as file:
            if not self._whole:
                _end_torn_line(file)
            self._whole = False
            size = file.tell()
            if file.write(data) != len(data):
                # A full disk took a part of it: nothing of it must stay, as all of it is written again.
                file.truncate(size)
                raise OSError(errno.ENOSPC, "no room for the record of the run", str(self._path))
        self._whole = True
        if size + len(data) >= SEGMENT_BYTES:
            # The lines are written: a failure from here on is no reason to write them again, and the next append tries again.
            with contextlib.suppress(OSError):
                self._rotate()

    def _tidy(self) -> None:
        """What a killed process left: a half-written thinned file, and a live one that had come from a bucket and was full."""
        for left in self._path.parent.glob(".events-*.tmp"):
            left.unlink(missing_ok=True)
        if self._path.exists() and _is_superseded(_first_line(self._path), self._storage.names(self._folder)):
            self._path.unlink()
        self._tidied = True

    def _rotate(self) -> None:
        numbers = numbers_of(self._storage.names(self._folder))
        self._path.rename(self._path.with_name(segment_name(max(numbers, default=0) + 1)))
        self._bound.apply()


def _first_line(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.readline(_TAIL_BYTES)


def _end_torn_line(file: FileIO) -> None:
    """A process that was killed while it wrote leaves half a line; the next record must not grow onto it."""
    if file.seek(0, SEEK_END) > 0:
        file.seek(-1, SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


class ObjectSink:
    """Lines of an object that is put whole, at most every ``upload_interval_s`` seconds and at the end."""

    def __init__(self, storage: Storage, folder: str, upload_interval_s: float) -> None:
        self._storage, self._folder = storage, folder
        self._upload_interval_s = upload_interval_s
        self._bound = Bound(storage, folder)
        self._content: bytearray | None = None
        self._number = 1
        self._uploaded = 0
        self._next = 0.0

    def append(self, data: bytes, *, last: bool) -> None:
        content = self._content if self._content is not None else self._open()
        if data and not content:
            content += _header(self._number)
        content += data
        if len(content) > self._uploaded and (last or time.monotonic() >= self._next):
            self._next = time.monotonic() + self._upload_interval_s
            try:
                self._upload(content)
            except Exception:
                if last:
                    raise
                # Tried again with the next upload; until then memory is bounded as the files are.
                if len(content) > TOTAL_BYTES:
                    content[:] = thinned(bytes(content))

    def _open(self) -> bytearray:
        """What there is of the live object, less what a kill has left of one that has its number already."""
        names = self._storage.names(self._folder)
        found = self._storage.read(f"{self._folder}/{LIVE}") if LIVE in names else b""
        if _is_superseded(found, names):
            found = b""
        if found and not found.endswith(b"\n"):
            found += b"\n"
        self._number = max(numbers_of(names), default=0) + 1
        self._uploaded = len(found)
        if found and _segment_of(found) != self._number:
            found = _header(self._number) + found
        self._content = bytearray(found)
        return self._content

    def _upload(self, content: bytearray) -> None:
        if len(content) >= OBJECT_SEGMENT_BYTES:
            self._storage.write(f"{self._folder}/{segment_name(self._number)}", bytes(content))
            self._number += 1
            content[:] = _header(self._number)
            self._uploaded = 0
            with contextlib.suppress(Exception):
                # From here on the lines are safe; what fails is done at the next upload or the next full one.
                self._storage.write(f"{self._folder}/{LIVE}", bytes(content))
                self._uploaded = len(content)
                self._bound.apply()
            return
        size = len(content)
        self._storage.write(f"{self._folder}/{LIVE}", bytes(content))
        self._uploaded = size


def _header(number: int) -> bytes:
    return note_line(0, segment=number)


def _segment_of(live: bytes) -> int | None:
    """The number that a live file says it will get; None where it says none: then it has none yet."""
    first = live[: live.find(b"\n") + 1]
    try:
        value = json.loads(first).get("segment")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None


def _is_superseded(live: bytes, names: Sequence[str]) -> bool:
    return _segment_of(live) in numbers_of(names)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_lines(storage: Storage, folder: str) -> Iterator[JsonDict]:
    """Every line of the files in order, notes too; half lines that a kill left behind are passed over.

    A run may go on meanwhile: each line that was there at the call comes once.
    """
    numbers, live = _snapshot(storage, folder)
    for number in numbers:
        yield from _parsed(storage.read(f"{folder}/{segment_name(number)}"))
    yield from _parsed(live)


def _snapshot(storage: Storage, folder: str) -> tuple[list[int], bytes]:
    """The full files and the content of the live one, of one moment."""
    names = storage.names(folder)
    try:
        live = storage.read(f"{folder}/{LIVE}") if LIVE in names else b""
    except FileNotFoundError:
        live = b""
    numbers = numbers_of(storage.names(folder))
    if numbers != numbers_of(names):
        return numbers, b""  # it became a full one meanwhile: all that was there at the call is in those
    return numbers, b"" if _is_superseded(live, names) else live


def _parsed(data: bytes) -> Iterator[JsonDict]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def has_lines(storage: Storage, folder: str) -> bool:
    """Whether anything was ever written."""
    names = storage.names(folder)
    return LIVE in names or bool(numbers_of(names))


def newest_lines(storage: Storage, folder: str) -> Iterator[JsonDict]:
    """Every line from the newest back to the oldest, read from the end as far as they are taken."""
    names = storage.names(folder)
    live = f"{folder}/{LIVE}"
    if LIVE in names:
        try:
            if not _is_superseded(storage.read_range(live, 0, _TAIL_BYTES), names):
                yield from _backwards(storage, live)
        except FileNotFoundError:
            names = storage.names(folder)  # it became a full one just now
    for number in reversed(numbers_of(names)):
        yield from _backwards(storage, f"{folder}/{segment_name(number)}")


def _backwards(storage: Storage, key: str) -> Iterator[JsonDict]:
    if not storage.is_local:
        yield from _lines_backwards(storage.size(key), lambda start, stop: storage.read_range(key, start, stop))
        return
    with open(storage.path(key), "rb") as file:  # held open: it may get another name meanwhile
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        yield from _lines_backwards(size, lambda start, stop: os.pread(descriptor, stop - start, start))


def _lines_backwards(size: int, read: Callable[[int, int], bytes]) -> Iterator[JsonDict]:
    rest, step, stop = b"", _TAIL_BYTES, size
    while stop > 0:
        start = max(0, stop - step)
        block = read(start, stop) + rest
        # The first line of a block may begin before it.
        rest, _, whole = (b"", b"", block) if start == 0 else block.partition(b"\n")
        yield from reversed(list(_parsed(whole)))
        stop, step = start, 2 * step
