"""The runs of a node as their records show them now."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from outgrow.monitoring.agent.run_state import ENDED, judge
from outgrow.monitoring.recording.attempt import FILE, AttemptFacts, read_facts
from outgrow.monitoring.recording.rank_file import file_name, rank_of, read_record
from outgrow.monitoring.recording.recorder import is_alive

RunState: TypeAlias = Literal["starting", "running", "stalled", "lost", "restarting", "finished", "failed", "interrupted"]

ENDED_SHOWN_S = 3600.0
"""How long a run is shown after it has ended."""
LOST_SHOWN_S = 86_400.0
"""And after its ranks have gone without a word."""

_ATTEMPT = re.compile(r"[0-9]{15}-.+", re.ASCII)
_SETTLED_S = 2.0
"""A folder that was changed less long ago may have changed once more within the same tick of its clock."""


@dataclass(frozen=True, kw_only=True)
class RankView:
    """One rank of the newest start of a run on this node; ``record`` are its slots, and ``read_at`` is when it was read, in
    seconds of the monotonic clock: just before, so that nothing in it is later."""

    rank: int
    record: Mapping[str, float]
    alive: bool
    read_at: float = math.nan


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The newest start of a run on this node. ``state`` is judged from the ranks of this node alone."""

    folder: Path
    facts: AttemptFacts
    ranks: Mapping[int, RankView]
    state: RunState

    @property
    def tells_the_run(self) -> bool:
        """Whether this node has rank 0, which speaks for the whole run."""
        return 0 in self.facts.local_ranks

    @property
    def touched(self) -> float:
        """Unix time of the last sign of any rank."""
        signs = [rank.record["touched"] for rank in self.ranks.values()]
        return max((sign for sign in signs if not math.isnan(sign)), default=self.facts.started)

    @property
    def is_live(self) -> bool:
        """Whether it has a process that is to make steps."""
        return self.state not in (*ENDED, "lost") and any(rank.alive for rank in self.ranks.values())


def scan(records: Path) -> list[RunView]:
    """Every run below ``records``, in the order of their names; who asks again and again keeps a ``Scanner``."""
    return Scanner(records).scan()


def shown(runs: Iterable[RunView], now: float) -> list[RunView]:
    """Those that are worth a series at the Unix time ``now``: live ones, and others for some time after their last sign."""
    return [run for run in runs if run.is_live or now - run.touched <= (ENDED_SHOWN_S if run.state in ENDED else LOST_SHOWN_S)]


class Scanner:
    """Reads the records below one folder again and again; what can change no more is read once. Any thread may ask."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._lock = threading.Lock()
        self._facts: dict[Path, tuple[tuple[int, int], AttemptFacts]] = {}
        self._ended: dict[Path, tuple[int, RunView]] = {}
        self.has_unnamed_life = False
        """Whether the last scan found a living rank of a run that nothing else is known of yet."""

    def scan(self) -> list[RunView]:
        """The newest start of every run whose facts can be read, in the order of their names."""
        with self._lock:
            return self._scan()

    def _scan(self) -> list[RunView]:
        self.has_unnamed_life = False
        found = [run for folder, changed in _folders(self._records) if (run := self._run(folder, changed)) is not None]
        kept = {run.folder for run in found}
        self._facts = {folder: known for folder, known in self._facts.items() if folder in kept}
        self._ended = {run.folder.parent: self._ended[run.folder.parent] for run in found if run.folder.parent in self._ended}
        return sorted(found, key=lambda run: run.facts.run)

    def _run(self, folder: Path, changed: int) -> RunView | None:
        ended = self._ended.get(folder)
        if ended is not None and ended[0] == changed:
            return ended[1]
        attempts = sorted((one for one, _ in _folders(folder) if _ATTEMPT.fullmatch(one.name)), reverse=True)
        known = next(((one, facts) for one in attempts if (facts := self._read_facts(one)) is not None), None)
        if known is None or known[1].run != folder.name:
            self.has_unnamed_life |= bool(attempts) and _has_life(attempts[0])
            return None
        run = view(*_newest(attempts[0], *known))
        if run.folder == attempts[0] and _is_over(run) and time.time_ns() - changed > _SETTLED_S * 1e9:
            self._ended[folder] = (changed, run)
        return run

    def _read_facts(self, attempt: Path) -> AttemptFacts | None:
        """What was once read stays known, whatever then becomes of the file."""
        known = self._facts.get(attempt)
        try:
            about = os.stat(attempt / FILE)
        except OSError:
            return known[1] if known else None
        stamp = (about.st_ino, about.st_mtime_ns)
        if known and known[0] == stamp:
            return known[1]
        facts = read_facts(attempt)
        if facts is not None:
            self._facts[attempt] = (stamp, facts)
            return facts
        return known[1] if known else None


def view(attempt: Path, facts: AttemptFacts) -> RunView:
    """One start as its records show it now."""
    ranks = {}
    for rank in facts.local_ranks:
        read_at = time.monotonic()
        record = read_record(attempt / file_name(rank))
        if record is not None:
            ranks[rank] = RankView(rank=rank, record=record, alive=is_alive(record), read_at=read_at)
    return RunView(folder=attempt, facts=facts, ranks=ranks, state=judge(facts, ranks, time.time()))


def _newest(newest: Path, told: Path, facts: AttemptFacts) -> tuple[Path, AttemptFacts]:
    """The newest start and its facts. A start writes them once its model is built: until then the start before, ``told``, says
    what the run is, and the records themselves which ranks there are."""
    ranks = _recorded(newest) if newest != told else ()
    if not ranks:
        return told, facts
    started, _, attempt = newest.name.partition("-")
    return newest, replace(facts, attempt=attempt, started=int(started) / 1000, local_ranks=ranks)


def _recorded(attempt: Path) -> tuple[int, ...]:
    return tuple(sorted(rank_of(path) for path in attempt.glob("rank-*.rec") if path.stem[5:].isdecimal()))


def _has_life(attempt: Path) -> bool:
    records = (read_record(attempt / file_name(rank)) for rank in _recorded(attempt))
    return any(is_alive(record) for record in records if record is not None)


def _is_over(run: RunView) -> bool:
    """Whether nothing in its records can change any more, nor what follows from them: one ``restarting`` may yet be lost."""
    complete = set(run.ranks) == set(run.facts.local_ranks)
    return complete and run.state in (*ENDED, "lost") and not any(rank.alive for rank in run.ranks.values())


def _folders(parent: Path) -> Iterator[tuple[Path, int]]:
    """Folders in a folder, and when each was changed last, in nanoseconds; links are none."""
    try:
        with os.scandir(parent) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False).st_mtime_ns
                except OSError:
                    continue  # removed meanwhile
    except OSError:
        return
