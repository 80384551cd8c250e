"""Jobs whose shards are read through a first tier, ranks of them as processes of their own, and the prefetchers that they
start."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
from tiered_rank import digest
from token_stores import Dataset, layout

from outgrow.contracts import JobSpec, RunRef, ShardCounts
from outgrow.storage import tree_digests
from outgrow.streaming.loader import build_loader, build_validation
from outgrow.streaming.tiers.slot import read_counts

_PREFETCHER = "outgrow.streaming.tiers.prefetcher"
_RANK = "import sys; sys.path[:] = {path!r}; from tiered_rank import main; main(*sys.argv[1:])"


def tiered(
    dataset: Dataset,
    folder: Path,
    *,
    cache: str = "auto",
    run: str = "test",
    more_tiers: Iterable[dict[str, Any]] = (),
    reserve: str = "0 B",
    **recipe: Any,
) -> JobSpec:
    """A job on the dataset, whose storage is a slow disk, that reads through the tier ``nvme`` in ``folder``."""
    job = dataset.job(**recipe)
    hot = {"name": "nvme", "path": str(folder / "nvme"), "reserve": reserve, "run_cache": cache}
    site = {**job.site, "cache": str(folder / "meta"), "tiers": [hot, *more_tiers]}
    return dataclasses.replace(job, site=site, run=RunRef(name=run, folder=f"runs/{run}", fingerprint=f"fingerprint of {run}"))


def read(job: JobSpec, start: int, stop: int, *, rank: int = 0, world: int = 1, **how: Any) -> list[str]:
    """A digest of all that each step gives the rank."""
    with closing(build_loader(job, layout(world), rank, start_step=start, stop_step=stop, **how)) as loader:
        return [digest(rows) for rows in loader]


def read_validation(job: JobSpec) -> list[str]:
    return [f"{name} {digest(rows)}" for name, rows in build_validation(job, layout(1), 0)]


def originals(dataset: Dataset) -> dict[str, str]:
    """Digests of everything below the dataset's storage."""
    return tree_digests(dataset.root)


def slots(job: JobSpec) -> list[str]:
    """Names of the slots of the first tier."""
    return sorted(path.parent.name for path in Path(job.site["tiers"][0]["path"]).glob("shards/*/LEASE"))


def counts_at_end(job: JobSpec) -> ShardCounts:
    """Of a run that has ended: they are written last of all."""
    (slot,) = slots(job)
    counts = read_counts(Path(job.site["tiers"][0]["path"]) / "shards" / slot)
    assert counts is not None
    return counts


def cached(job: JobSpec) -> list[Path]:
    """The copied shards, whole or not."""
    return sorted(Path(job.site["tiers"][0]["path"]).glob("shards/*/streams/*/*/*"))


def prefetchers(folder: Path) -> list[psutil.Process]:
    """The prefetchers that serve runs below ``folder``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if _PREFETCHER in words and f"'{folder}/" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until_gone(folder: Path, timeout_s: float = 10) -> None:
    """Returns once no prefetcher serves a run below ``folder``."""
    deadline = time.monotonic() + timeout_s
    while left := prefetchers(folder):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def flip(path: Path, at: int = -9) -> None:
    """Change one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- ranks as processes -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rank:
    """A process that reads steps as a rank does, and writes the digest of each to ``notes`` as it comes."""

    process: subprocess.Popen[bytes]
    notes: Path

    @property
    def steps(self) -> dict[int, str]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return {step: found for step, found in (json.loads(line) for line in lines)}

    def wait_for(self, steps: int, timeout_s: float = 60) -> None:
        """Returns once it has read so many steps."""
        deadline = time.monotonic() + timeout_s
        while len(self.steps) < steps:
            assert self.process.poll() is None, f"ended with exit code {self.process.returncode}"
            assert time.monotonic() < deadline, f"{len(self.steps)} steps"
            time.sleep(0.01)

    def end(self, timeout_s: float = 60) -> dict[int, str]:
        """What it has read, once it has ended well."""
        assert self.process.wait(timeout_s) == 0
        return self.steps

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_rank(
    job: JobSpec, folder: Path, start: int, stop: int, *, rank: int = 0, world: int = 1, attempt: str = "", step_s: float = 0
) -> Rank:
    """A rank that takes ``step_s`` a step; ``folder`` is for its notes."""
    number = len(list(folder.glob("job-*.json")))
    told = {"job": job.to_dict(), "layout": layout(world).to_dict(), "rank": rank, "attempt": attempt}
    notes = folder / f"notes-{number}.jsonl"
    told |= {"notes": str(notes), "start": start, "stop": stop, "step_s": step_s}
    (folder / f"job-{number}.json").write_text(json.dumps(told))
    code = _RANK.format(path=sys.path)
    return Rank(subprocess.Popen([sys.executable, "-c", code, str(folder / f"job-{number}.json")]), notes)
