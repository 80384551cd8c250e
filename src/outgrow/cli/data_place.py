"""``outgrow data place``: where kept folders lie whole, where the site wants them, and the copies that are missing."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import INTERRUPTED, SiteOption, open_site
from outgrow.cli.table import print_table

if TYPE_CHECKING:
    from outgrow.recipes.schema.site import Site
    from outgrow.storage import Storage
    from outgrow.streaming.tiers.contents import Contents
    from outgrow.streaming.tiers.placement import Copy, Item
    from outgrow.streaming.tiers.placing import Outcome, Placer
    from outgrow.streaming.tiers.stock import Shelves, Stock

_LINE_EVERY_S = 10.0
_COLUMNS = ("folder", "kind", "size", "lies on", "wanted on", "to do")


def place(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Only these folders; else all.", show_default=False)
    ] = None,
    site: SiteOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Make the copies; else only show them.")] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TIER", help="Copy the KEYs there, wanted or not.", show_default=False),
    ] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="KEY", help="Delete the copy of KEY on --from.", show_default=False)
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="TIER", help="See --remove.", show_default=False)] = None,
    limit: Annotated[
        str | None, typer.Option("--limit", metavar="RATE", help="Copy no faster, as 60 MB/s.", show_default=False)
    ] = None,
    every: Annotated[
        float | None,
        typer.Option("--every", min=0.01, metavar="MINUTES", help="Do it again and again, until stopped.", show_default=False),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of the copies again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where datasets, weights and checkpoints lie, and where ``place:`` of the site wants copies; --apply makes them.

    Originals stay. With --apply or --every the process has the lowest priority, so that a run beside it is not slowed down.
    """
    from outgrow.streaming.tiers.places import open_places
    from outgrow.streaming.tiers.stock import Shelves

    beside = {"KEY": keys, "--apply": apply, "--to": to, "--limit": limit, "--every": every, "--verify": verify}
    _check_options(beside | {"--json": as_json}, remove=remove, from_=from_)
    opened = open_site(site)
    asked = _Asked(keys=tuple(keys or ()), to=to, limit_bytes_per_s=_rate(limit), apply=apply, verify=verify, as_json=as_json)
    shelves = Shelves(opened, open_places(opened), checkpoint_contents)
    progress = _Progress()
    placer = _placer(opened, shelves, asked, progress)
    if remove is not None and from_ is not None:
        _remove(shelves, placer, remove, from_)
        return
    if apply:
        _give_way()
    try:
        needs_attention = _round(opened, shelves, placer, progress, asked)
        while every is not None:
            time.sleep(every * 60)
            needs_attention = _round(opened, shelves, placer, progress, asked)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on with what is finished", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if needs_attention:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the command line asks for."""

    keys: tuple[str, ...]
    to: str | None
    limit_bytes_per_s: float | None
    apply: bool
    verify: bool
    as_json: bool


def _check_options(given: Mapping[str, object], *, remove: str | None, from_: str | None) -> None:
    """Raises ``DataError`` where options do not go together; ``given`` are those beside --remove and --from, by name."""
    from outgrow.errors import DataError

    if given["--to"] and not given["KEY"]:
        raise DataError("--to TIER needs the folders to copy there", hint="outgrow data place KEY... --to TIER")
    if given["--every"] and not given["--apply"]:
        raise DataError("--every copies again and again", hint="outgrow data place --apply --every MINUTES")
    if (remove is None) != (from_ is None):
        raise DataError("--remove and --from go together", hint="outgrow data place --remove KEY --from TIER")
    beside = ", ".join(name for name, value in given.items() if value)
    if remove is not None and beside:
        raise DataError(f"--remove does not go with {beside}", hint="outgrow data place --remove KEY --from TIER")


def _rate(limit: str | None) -> float | None:
    from outgrow.errors import DataError
    from outgrow.recipes.schema.sizes import parse_rate

    try:
        return None if limit is None else parse_rate(limit)
    except ValueError as error:
        raise DataError(str(error), where="--limit") from None


def _placer(site: Site, shelves: Shelves, asked: _Asked, progress: _Progress) -> Placer:
    from outgrow.streaming.tiers.placing import Placer

    return Placer(
        shelves,
        locks=Path(site.cache) / ".locks",
        limit_bytes_per_s=asked.limit_bytes_per_s,
        on_bytes=progress.add,
        on_wait=lambda name: typer.echo(f"waiting for another process that writes to {name}", err=True),
    )


# --- one round --------------------------------------------------------------------------------------------------------


def _round(site: Site, shelves: Shelves, placer: Placer, progress: _Progress, asked: _Asked) -> bool:
    """Show what is to be copied or copy it; whether something needs attention afterwards."""
    from outgrow.streaming.tiers.placement import plan_copies
    from outgrow.streaming.tiers.placing import FINE
    from outgrow.streaming.tiers.stock import known_speeds

    stock = shelves.stock(read=asked.verify)
    wanted = _wanted(site, shelves, stock, asked)
    copies = plan_copies(stock.items, wanted, stock.rooms, known_speeds(shelves.places, asked.limit_bytes_per_s))
    notes = [*stock.notes, *(placer.tidy(stock) if asked.apply else ())]
    if not asked.as_json:
        _show(stock, wanted, copies, notes)
    outcomes = [_make(placer, copy, progress, quiet=asked.as_json) for copy in copies if asked.apply and not copy.refusal]
    if asked.as_json:
        _print_json(stock, copies, outcomes, notes)
    else:
        typer.echo(_summary(copies, outcomes) if asked.apply else _forecast(stock, copies))
    mended = {(outcome.copy.key, outcome.copy.target) for outcome in outcomes if outcome.result in FINE}
    problems = {(item.key, holding.place) for item in stock.items for holding in item.holdings if holding.problem}
    unmade = any(outcome.result not in FINE for outcome in outcomes) or any(copy.refusal for copy in copies if asked.apply)
    return unmade or not problems <= mended


def _wanted(site: Site, shelves: Shelves, stock: Stock, asked: _Asked) -> list[tuple[Item, str]]:
    """Every (item, place) that is asked for: by the keys given, or else by the site."""
    from outgrow.errors import DataError
    from outgrow.streaming.tiers.placement import wanted_copies

    wanted = wanted_copies(stock.items, site.place)
    if not asked.keys:
        return wanted
    chosen = _chosen(stock, asked.keys)
    if asked.to is not None:
        name = shelves.place(asked.to).name
        return [(item, name) for item in chosen]
    wanted = [(item, target) for item, target in wanted if item in chosen]
    if not wanted:
        raise DataError(
            f"place: of the site wants {', '.join(asked.keys)} on no tier",
            hint="--to TIER says where to, whatever the site wants",
        )
    return wanted


def _make(placer: Placer, copy: Copy, progress: _Progress, *, quiet: bool) -> Outcome:
    from outgrow.streaming.tiers.slot_room import shown

    progress.begin(f"{copy.key} to {copy.target}", copy.num_bytes)
    outcome = placer.place(copy)
    if quiet:
        return outcome
    if outcome.result == "copied":
        rate = f", {outcome.num_bytes / outcome.seconds / 1e6:,.1f} MB/s" if outcome.num_bytes > 10**8 else ""
        typer.echo(f"{copy.key}: copied to {copy.target}, {shown(outcome.num_bytes)} in {outcome.seconds:,.1f} s{rate}")
    else:
        typer.echo(f"{copy.key}: {outcome.result} ({copy.target}): {outcome.message}".rstrip(": "), err=True)
    return outcome


def _chosen(stock: Stock, keys: Sequence[str]) -> list[Item]:
    """The items of the keys, and of those below them. Raises ``DataError`` with the nearest for a key that is not there."""
    from outgrow.errors import DataError

    chosen = [item for item in stock.items if any(item.key == key or item.key.startswith(f"{key}/") for key in keys)]
    for key in keys:
        if not any(item.key == key or item.key.startswith(f"{key}/") for item in chosen):
            near = difflib.get_close_matches(key, [item.key for item in stock.items], n=1)
            hint = f"did you mean {near[0]}?" if near else "outgrow data place lists all"
            raise DataError(f"no place has a folder {ascii(key)}", hint=hint)
    return chosen


def _remove(shelves: Shelves, placer: Placer, key: str, name: str) -> None:
    from outgrow.errors import DataError
    from outgrow.recipes.placed import is_name
    from outgrow.streaming.tiers.placement import removal_refusal

    target, stock = shelves.place(name), shelves.stock(read=False)
    if all(map(is_name, key.split("/"))) and (claim := shelves.claim(target, key)) and all(i.key != key for i in stock.items):
        placer.remove(claim.kind, key, name)
        typer.echo(f"{key}: what was begun of a copy on {name} is removed")
        return
    chosen = _chosen(stock, [key])
    there = [item for item in reversed(chosen) if item.at(name) is not None or item.key == key]  # what lies below goes first
    for item in there:
        refusal = removal_refusal(item, name)
        if refusal and shelves.claim(target, item.key) is None:
            raise DataError(refusal, where=target.storage.root_url)
    for item in there:
        placer.remove(item.kind, item.key, name)
        typer.echo(f"{item.key}: removed from {name}")


# --- what is shown ----------------------------------------------------------------------------------------------------


def _show(stock: Stock, wanted: Sequence[tuple[Item, str]], copies: Sequence[Copy], notes: Sequence[str]) -> None:
    from outgrow.streaming.tiers.slot_room import shown

    rows = []
    for item in stock.items:
        targets = ", ".join(target for each, target in wanted if each is item)
        todo = "; ".join(_todo(copy) for copy in copies if copy.key == item.key)
        rows.append((item.key, item.kind, shown(item.num_bytes), _holders(item), targets or "-", todo or "-"))
    if rows:
        print_table(_COLUMNS, rows)
    for note in notes:
        typer.echo(f"note: {note}")


def _holders(item: Item) -> str:
    words = []
    for holding in item.holdings:
        name = holding.place or "its source"
        state = "copy" if holding.copied else "original"
        if holding.problem:
            state = f"{state}: {holding.problem}"
        elif holding.version != item.version:
            state = f"{state} of another version"
        words.append(f"{name} ({state})")
    return ", ".join(words)


def _todo(copy: Copy) -> str:
    from outgrow.streaming.tiers.slot_room import shown

    if copy.refusal:
        return f"{copy.target}: no: {copy.refusal}"
    seconds = "" if copy.seconds is None else f", {copy.seconds:,.0f} s"
    return f"{copy.target}: {'repair' if copy.repair else 'copy'} {shown(copy.num_bytes)}{seconds}"


def _forecast(stock: Stock, copies: Sequence[Copy]) -> str:
    from outgrow.streaming.tiers.slot_room import shown

    making = [copy for copy in copies if not copy.refusal]
    refused = len(copies) - len(making)
    beside = f"; {refused} cannot be made" if refused else ""
    if not making:
        return f"nothing to copy{beside}" if stock.items else "no datasets, weights or checkpoints in any place"
    known = [copy.seconds for copy in making if copy.seconds is not None]
    seconds = f", about {sum(known):,.0f} s" if len(known) == len(making) else ""
    size = shown(sum(copy.num_bytes for copy in making))
    return f"{len(making)} to copy, {size}{seconds}{beside}; --apply makes them"


def _summary(copies: Sequence[Copy], outcomes: Sequence[Outcome]) -> str:
    from outgrow.streaming.tiers.placing import FINE
    from outgrow.streaming.tiers.slot_room import shown

    if not copies:
        return "all that is wanted is in place"
    made = [outcome for outcome in outcomes if outcome.result == "copied"]
    left = sum(outcome.result not in FINE for outcome in outcomes) + sum(bool(copy.refusal) for copy in copies)
    size = shown(sum(outcome.num_bytes for outcome in made))
    return f"{len(made)} copied and verified, {size}" + (f"; {left} not: see above" if left else "; all is in place")


def _print_json(stock: Stock, copies: Sequence[Copy], outcomes: Sequence[Outcome], notes: Sequence[str]) -> None:
    value = {
        "items": [{**asdict(item), "bytes": item.num_bytes} for item in stock.items],
        "rooms": {name: {**asdict(room), "left_bytes": room.left_bytes} for name, room in stock.rooms.items()},
        "copies": [asdict(copy) for copy in copies],
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "notes": list(notes),
    }
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


class _Progress:
    """How far a copy is, in a line on stderr every ten seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begin("", 0)

    def begin(self, what: str, total_bytes: int) -> None:
        self._what, self._total, self._done = what, total_bytes, 0
        self._start = time.monotonic()
        self._next = self._start + _LINE_EVERY_S

    def add(self, num_bytes: int) -> None:
        from outgrow.streaming.tiers.slot_room import shown

        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _LINE_EVERY_S
                rate = self._done / (now - self._start) / 1e6
                typer.echo(f"{self._what}: {shown(self._done)} of {shown(self._total)}, {rate:,.1f} MB/s", err=True)


# --- what the parts of outgrow are told of one another ----------------------------------------------------------------


def checkpoint_contents(storage: Storage, folder: str) -> Contents:
    """What a checkpoint consists of, by its own manifest."""
    from outgrow.storage import digest
    from outgrow.streaming.tiers.contents import Contents, FileFacts
    from outgrow.trainers.checkpoint.catalog import examine
    from outgrow.trainers.checkpoint.format import MANIFEST

    saved = examine(storage, folder)
    files = {MANIFEST: FileFacts(sha256=saved.ref.digest)}
    for name, entry in saved.manifest.files.items():
        if len(entry.chunks) > 1:
            files[name] = FileFacts(num_bytes=entry.size, chunk_bytes=saved.manifest.chunk_bytes, chunks=entry.chunks)
        else:
            files[name] = FileFacts(num_bytes=entry.size, sha256=entry.chunks[0] if entry.chunks else digest(b""))
    return Contents(digest=saved.ref.digest, files=files)


def _give_way() -> None:
    """Take the lowest priority for processor and disk that this system has."""
    import psutil

    os.nice(19)
    with contextlib.suppress(AttributeError, OSError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
