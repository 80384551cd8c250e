"""The run folders of a site: which one a command goes on with, what may change on the way, and what is known of each.

A run is named by ``run.name`` and the fingerprint of what is learned. The same command resumes it; a changed key is shown and
taken, taken on request, or refused, as ``recipes.identity`` says. ``--fresh`` starts a new folder and deletes none.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

import yaml

from outgrow.cluster import run_lock
from outgrow.contracts import JsonDict, Record, RunRef, StepRecord
from outgrow.errors import IntegrityError, RunError
from outgrow.monitoring.events import read_events
from outgrow.recipes.identity import Difference, differences, fingerprint
from outgrow.recipes.schema import Recipe
from outgrow.storage import Storage

FOLDER = "runs"
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"

State: TypeAlias = Literal["running", "finished", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunFile(Record):
    """What ``run.json`` holds; ``created`` is UTC, ISO 8601."""

    name: str
    fingerprint: str
    created: str
    recipe: JsonDict


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run folder and its ``run.json``."""

    ref: RunRef
    file: RunFile


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A run folder that this process alone may write, as long as it holds it.

    ``differences`` are the changed keys that were taken; ``taken_from`` names the dead owner whose lock this was, else empty.
    """

    run: RunRef
    resumed: bool
    differences: tuple[Difference, ...]
    taken_from: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as ``outgrow runs`` shows it: ``owner`` runs it now, else empty; its newest record of all, and of each kind."""

    stored: StoredRun
    state: State
    owner: str
    last: StepRecord | None
    newest: dict[str, StepRecord]


# --- going on with a run, or starting one -----------------------------------------------------------------------------


@contextlib.contextmanager
def claim(storage: Storage, recipe: Recipe, data_fingerprint: str, *, fresh: bool, accept: bool) -> Iterator[Claim]:
    """The run folder that ``recipe`` on this dataset goes on with, or a new one; held until the ``with`` ends.

    Raises ``RunError`` where a live process holds it, where a changed key is refused or not accepted, and where the name is
    already that of a run that learns something else.
    """
    run, stored = choose(storage, recipe, data_fingerprint, fresh=fresh)
    with run_lock.hold(storage, run.folder) as dead:
        taken = () if stored is None else _judge(stored, recipe, accept=accept)
        if stored is None or taken:
            created = datetime.now(UTC).isoformat(timespec="seconds") if stored is None else stored.file.created
            _write(storage, run, recipe, created)
        yield Claim(run=run, resumed=stored is not None, differences=taken, taken_from=str(dead) if dead else "")


def choose(storage: Storage, recipe: Recipe, data_fingerprint: str, *, fresh: bool) -> tuple[RunRef, StoredRun | None]:
    """The run folder that ``claim`` would take, and what is stored there, None for a new one; writes nothing.

    Raises ``RunError`` where the newest run of that name learns something else.
    """
    name, learned = recipe.run.name, fingerprint(recipe, data_fingerprint)
    named = stored_runs(storage, name)
    same = [run for run in named if run.file.fingerprint == learned]
    if same and not fresh:
        return same[-1].ref, same[-1]
    if named and not fresh:
        raise _learns_something_else(named[-1], recipe)
    folder = f"{FOLDER}/{name}-{learned[:8]}"
    taken = {run.ref.folder for run in named}
    numbered = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return RunRef(name=name, folder=next(f for f in numbered if f not in taken), fingerprint=learned), None


def _judge(stored: StoredRun, recipe: Recipe, *, accept: bool) -> tuple[Difference, ...]:
    """The changed keys, all of them taken. Raises ``RunError`` where one is refused, or would need ``accept``."""
    changed = differences(stored.file.recipe, recipe.to_dict())
    refused = [difference for difference in changed if difference.verdict == "refuse"]
    if refused:
        raise _learns_something_else(stored, recipe)
    asked = [difference for difference in changed if difference.verdict == "accept"]
    if asked and not accept:
        raise RunError(
            f"the recipe differs from the one that this run was started with:\n{_lines(asked)}",
            where=stored.ref.folder,
            hint="go on with the changed keys: --accept; or start a new run beside it: --fresh",
        )
    return tuple(changed)


def _learns_something_else(stored: StoredRun, recipe: Recipe) -> RunError:
    changed = differences(stored.file.recipe, recipe.to_dict())
    lines = _lines([difference for difference in changed if difference.verdict == "refuse"])
    return RunError(
        f"the run '{stored.file.name}' learns something else:\n{lines or '  the content of the data has changed'}",
        where=stored.ref.folder,
        hint="give this one another name: run.name=...; or start a new run of the same name beside it: --fresh",
    )


def _lines(changed: Sequence[Difference]) -> str:
    return "\n".join(f"  {difference}" for difference in changed)


def _write(storage: Storage, run: RunRef, recipe: Recipe, created: str) -> None:
    data = recipe.to_dict()
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    storage.write(f"{run.folder}/{RECIPE_FILE}", text.encode())
    file = RunFile(name=run.name, fingerprint=run.fingerprint, created=created, recipe=data)
    storage.write_json(f"{run.folder}/{RUN_FILE}", file.to_dict())  # last: without it there is no run


# --- what runs there are ----------------------------------------------------------------------------------------------


def stored_runs(storage: Storage, name: str | None = None) -> list[StoredRun]:
    """The runs of the site, or those of one name, oldest first. Raises ``IntegrityError`` where a ``run.json`` is torn."""
    folders = [f"{FOLDER}/{entry}" for entry in storage.names(FOLDER) if name is None or entry.startswith(f"{name}-")]
    runs = [_read(storage, folder) for folder in folders if storage.exists(f"{folder}/{RUN_FILE}")]
    chosen = [run for run in runs if name is None or run.file.name == name]
    return sorted(chosen, key=lambda run: (run.file.created, _natural(run.ref.folder)))


def _read(storage: Storage, folder: str) -> StoredRun:
    key = f"{folder}/{RUN_FILE}"
    try:
        file = RunFile.from_dict(storage.read_json(key))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"this is no run: {error}", where=key, hint="move the folder away") from error
    return StoredRun(ref=RunRef(name=file.name, folder=folder, fingerprint=file.fingerprint), file=file)


def _natural(folder: str) -> tuple[int, str]:
    """Sorts ``-10`` after ``-9``: runs of one second are in the order of their numbers."""
    return len(folder), folder


def find_run(storage: Storage, asked: str) -> StoredRun:
    """The run of that folder, or the newest run of that name. Raises ``RunError`` with the nearest where there is none."""
    runs = stored_runs(storage)
    folder = f"{FOLDER}/{asked.removeprefix(f'{FOLDER}/').rstrip('/')}"
    found = [run for run in runs if run.ref.folder == folder] or [run for run in runs if run.file.name == asked]
    if found:
        return found[-1]
    known = [run.ref.folder.removeprefix(f"{FOLDER}/") for run in runs]
    near = difflib.get_close_matches(asked, [*known, *(run.file.name for run in runs)], n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
    raise RunError(f"no run '{asked}' in {storage.root_url}", hint=hint)


def status(storage: Storage, stored: StoredRun) -> RunStatus:
    """Whether the run is going, finished or stopped, and its newest records."""
    owner = run_lock.holder(storage, stored.ref.folder)
    last, newest = None, dict[str, StepRecord]()
    for last in read_events(storage, stored.ref.folder):
        newest[last.kind] = last
    ended = last is not None and last.kind == "end"
    state: State = "running" if owner is not None else "finished" if ended else "stopped"
    return RunStatus(stored=stored, state=state, owner=str(owner) if owner else "", last=last, newest=newest)
