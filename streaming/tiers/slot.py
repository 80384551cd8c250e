"""Slots: folders of the first tier that runs keep copied shards in, one a run and node at a time.

A slot is ``<tier>/shards/<store>.<n>/``. Its holder keeps the file ``LEASE`` locked, and the kernel frees the lock when the
holder dies, however it dies; the copied shards stay and are taken over by the next run that reads the same store. Who gets
which slot, and how much room, is settled under one lock of the tier, ``shards/.lock``. What lies in slots that nobody holds is
deleted when its room is needed. Folders without a ``LEASE`` are not ours and are left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from outgrow.contracts import ShardCounts
from outgrow.errors import DataError, SiteError
from outgrow.recipes.placed import PLACED, read_records
from outgrow.storage import nearest_folder
from outgrow.streaming.manifest import MARKER, is_inside
from outgrow.streaming.tiers import slot_files
from outgrow.streaming.tiers.lease import LEASE, QUIET_S, RECORD, Holder, Lease, is_held, last_used, tier_lock
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.shard_list import ShardFile, ShardList
from outgrow.streaming.tiers.slot_files import COUNTS
from outgrow.streaming.tiers.slot_room import Held, Space, choose_room, to_free

SLOTS = "shards"
"""The folder of a tier that its slots lie in."""

_POLL_S = 0.1


@dataclass(kw_only=True)
class Slot:
    """A slot that this process holds until ``close``, ``room_bytes`` of which it may fill. Copied shards stay in it.

    ``whole`` is the store's folder where the tier holds it whole, so that its shards need no copy.
    """

    folder: Path
    room_bytes: int
    lease: Lease
    whole: Path | None = None

    def path(self, file: ShardFile) -> Path:
        """Where the copy of a shard belongs. Raises ``DataError`` for a name that leads elsewhere."""
        if not is_inside(file.name) or not file.name.startswith(f"{slot_files.STREAMS}/"):
            raise DataError(f"a shard cannot be kept under the name {ascii(file.name)}", where=str(self.folder))
        return self.folder / file.name

    def present(self, shards: ShardList) -> dict[int, int]:
        """Bytes by number of each shard that lies here with its right size; its bytes are not verified.

        What else lies where shards do is deleted: parts of copies, shards of another size, and, where all exceed the room,
        those with the highest numbers. Where the tier holds the store whole, its shards get a second name here, which takes no
        room.
        """
        numbers = {shards.file(number).name: number for number in range(len(shards))}
        found: dict[int, int] = {}
        for name, state in list(slot_files.copied_files(self.folder)):
            number = numbers.get(name)
            if number is not None and state.st_size == shards.num_bytes[number]:
                found[number] = state.st_size
            else:
                (self.folder / name).unlink()
        excess = sum(found.values()) - self.room_bytes
        for number in sorted(found, reverse=True):
            if excess <= 0:
                break
            self.path(shards.file(number)).unlink()
            excess -= found.pop(number)
        for number in range(len(shards) if self.whole is not None else 0):
            if number not in found and self._link(shards.file(number)):
                found[number] = int(shards.num_bytes[number])
        return found

    def close(self) -> None:
        """Give the slot back; a second time does nothing."""
        self.lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _link(self, file: ShardFile) -> bool:
        """Whether the whole copy's shard has got its second name here."""
        assert self.whole is not None
        source, target = self.whole / file.name, self.path(file)
        try:
            state = source.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(state.st_mode) or state.st_size != file.num_bytes:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
        return True


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """A slot as others see it: ``store`` is the last part of its store's key. ``leased`` while a living process, ``pid`` on
    ``host``, holds it for ``run``; else ``run`` was the last one. ``num_bytes`` of at most ``room_bytes`` are taken;
    ``last_used`` is Unix time, s."""

    folder: Path
    store: str
    run: str
    leased: bool
    pid: int
    host: str
    num_bytes: int
    room_bytes: int
    last_used: float
    counts: ShardCounts | None

    @property
    def name(self) -> str:
        return self.folder.name


def take_slot(hot: Place, store: str, *, run: str, dataset_bytes: int, smallest: int, patience_s: float) -> Slot:
    """A slot for the store under the key ``store``, with room for ``smallest`` bytes at least and ``dataset_bytes`` at most.

    The slot that ``run`` had last is preferred, and waited for at most ``patience_s`` where a process that is about to end
    still holds it; then another of the same store that nobody holds, then a new one. ``run`` is empty for a command that is no
    run. Counts of another run are removed; of slots that nobody holds, as many shards as stand in the way.

    Raises ``DataError`` where the tier has not that much room, ``SiteError`` where its folder cannot be used.
    """
    folder, name = _slots_folder(hot), PurePosixPath(store).name
    wanted = _Wanted(store=store, run=run, dataset_bytes=dataset_bytes, smallest=smallest)
    deadline = time.monotonic() + patience_s
    while True:
        with tier_lock(folder) as now:
            mine = [own for own in _slot_folders(folder) if _store(own) == name and Holder.read(own).run == run]
            if not any(is_held(own, now) for own in mine) or time.monotonic() >= deadline:
                known = [_look(own, now) for own in _slot_folders(folder)]
                own = _choose(known, name, run) or _new_folder(folder, name, now)
                return _take(hot, own, [state for state in known if state.folder != own], wanted)
        time.sleep(_POLL_S)


def slots(hot: Place) -> list[SlotState]:
    """The slots of a local tier, by name; empty where it has none."""
    folder = hot.folder / SLOTS
    if not folder.is_dir():
        return []
    with tier_lock(folder) as now:
        return [_look(own, now) for own in _slot_folders(folder)]


def remove_unheld(hot: Place, *, dry_run: bool = False) -> list[SlotState]:
    """The slots of a local tier that no process holds, deleted unless ``dry_run``."""
    folder = hot.folder / SLOTS
    if not folder.is_dir():
        return []
    with tier_lock(folder) as now:
        unheld = [state for state in (_look(own, now) for own in _slot_folders(folder)) if not state.leased]
        if not dry_run:
            for state in unheld:
                slot_files.remove(state.folder)
        return unheld


def tier_space(hot: Place, others: Sequence[SlotState], *, own_bytes: int) -> Space:
    """What a local tier has for a slot with ``own_bytes`` of shards in it, beside the slots ``others``."""
    return Space(
        free_bytes=shutil.disk_usage(nearest_folder(hot.folder / SLOTS)).free,
        own_bytes=own_bytes,
        idle_bytes=sum(state.num_bytes for state in others if not state.leased),
        placed_bytes=placed_bytes(hot),
        held=[
            Held(name=state.name, run=state.run, num_bytes=state.num_bytes, room_bytes=state.room_bytes)
            for state in others
            if state.leased
        ],
    )


def placed_bytes(place: Place) -> int:
    """Bytes of the whole copies that were placed on a tier."""
    return sum(record.bytes for record in read_records(place.storage, PLACED))


def read_counts(folder: Path) -> ShardCounts | None:
    """What reading through a slot has cost; None where nothing was written yet, or by another version."""
    try:
        return ShardCounts.from_dict(json.loads((folder / COUNTS).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


def measured_speeds(hot: Place) -> dict[str, float]:
    """``newest_speeds`` of the slots of ``hot``."""
    return newest_speeds(slots(hot))


def newest_speeds(states: Sequence[SlotState]) -> dict[str, float]:
    """Bytes a second that were read of each place by the run that read of it last, by the place's name."""
    speeds: dict[str, float] = {}
    for state in sorted(states, key=lambda state: state.last_used, reverse=True):
        for name, traffic in (state.counts.tiers if state.counts else {}).items():
            if traffic.bytes and traffic.read_s > 0:
                speeds.setdefault(name, traffic.bytes / traffic.read_s)
    return speeds


def tier_folder(place: Place) -> Path:
    """The folder of a local tier, made where its disk is there: one that is not mounted is not written to.

    Raises ``SiteError`` where ``absence`` has something to say, or the folder cannot be made.
    """
    folder = place.folder
    try:
        if missing := absence(folder):
            raise SiteError(
                f"tier '{place.name}' is not there: {missing}",
                where=str(folder),
                hint=f"mount its disk, or make the folder {folder}; or change tiers: in site.yaml",
            )
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SiteError(f"tier '{place.name}' cannot be used: {error.strerror}", where=str(folder)) from None
    return folder


def absence(folder: Path) -> str:
    """What tells that the disk of a tier's folder is not mounted; empty where nothing does, or the folder is there."""
    above = folder.parent
    if folder.exists():
        return ""
    if not above.is_dir():
        return f"{above} does not exist"
    if not os.path.ismount(above) and not os.listdir(above):
        return f"{above} is empty, as a mount point is without its disk"
    return ""


# --- steps of taking one; the tier is locked --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What ``take_slot`` is asked for."""

    store: str
    run: str
    dataset_bytes: int
    smallest: int


def _slots_folder(hot: Place) -> Path:
    folder = tier_folder(hot) / SLOTS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SiteError(f"tier '{hot.name}' cannot be written: {error.strerror}", where=str(folder)) from None
    return folder


def _slot_folders(folder: Path) -> list[Path]:
    return sorted(own for own in folder.iterdir() if not own.name.startswith(".") and slot_files.is_slot(own))


def _store(slot: Path) -> str:
    return slot.name.rpartition(".")[0]


def _look(slot: Path, now: float) -> SlotState:
    holder = Holder.read(slot)
    return SlotState(
        folder=slot,
        store=_store(slot),
        run=holder.run,
        leased=is_held(slot, now),
        pid=holder.pid,
        host=holder.host,
        num_bytes=slot_files.copied_bytes(slot),
        room_bytes=holder.room_bytes,
        last_used=last_used(slot),
        counts=read_counts(slot),
    )


def _choose(known: Sequence[SlotState], store: str, run: str) -> Path | None:
    """The slot to take over: of the same run before others, and then the fullest. What a run has collected is not for commands,
    which need little."""
    free = [state for state in known if state.store == store and not state.leased and (run or not state.run)]
    best = max(free, key=lambda state: (state.run == run, state.num_bytes), default=None)
    return None if best is None else best.folder


def _new_folder(slots_folder: Path, store: str, now: float) -> Path:
    """A new slot's folder, or one whose maker or remover died long ago with nothing in it."""
    number = 0
    while True:
        folder = slots_folder / f"{store}.{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        state = folder.lstat()
        if stat.S_ISDIR(state.st_mode) and now - state.st_mtime > QUIET_S and not os.listdir(folder):
            return folder
        number += 1


def _take(hot: Place, folder: Path, others: Sequence[SlotState], wanted: _Wanted) -> Slot:
    lease = Lease.take(folder)
    try:
        slot_files.remove_asides(folder)
        whole = _whole_copy(hot, wanted.store, folder)
        room = _make_room(hot, folder, others, wanted) if whole is None else wanted.dataset_bytes
        if Holder.read(folder).run != wanted.run:
            (folder / COUNTS).unlink(missing_ok=True)
        Holder.here(wanted.run, room if whole is None else 0).write(folder)
    except BaseException:
        lease.close()
        if not (folder / RECORD).exists():  # made just now, for nothing
            slot_files.remove(folder)
        raise
    return Slot(folder=folder, room_bytes=room, lease=lease, whole=whole)


def _make_room(hot: Place, folder: Path, others: Sequence[SlotState], wanted: _Wanted) -> int:
    """The room of the slot, once slots that nobody holds have given up what it takes, the one unused for longest first."""
    space = tier_space(hot, others, own_bytes=slot_files.copied_bytes(folder))
    where = str(folder.parent)
    room = choose_room(hot.tier, space, dataset_bytes=wanted.dataset_bytes, smallest=wanted.smallest, where=where)
    short = to_free(hot.tier, space, room)
    for state in sorted((state for state in others if not state.leased), key=lambda state: state.last_used):
        if short <= 0:
            break
        short -= slot_files.shrink(state.folder, short)
    return room


def _whole_copy(hot: Place, store: str, folder: Path) -> Path | None:
    """The store's folder where the tier holds it whole and its files can get a second name in the slot."""
    if not hot.holds(store):
        return None
    whole, trial = Path(hot.storage.path(store)), folder / f"{LEASE}.link"
    try:
        os.link(whole / MARKER, trial)
    except OSError:
        return None
    trial.unlink()
    return whole
