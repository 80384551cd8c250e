"""How long a run waits for shards that come from a slow tier, with the prefetcher and without, and what was forecast.

    python benchmarks/tier_stall.py --line disk --line 100mbit

The slow tier is a folder that is read at 150 MB/s (``limit`` of the tier), or a real S3 server behind a line of 100 Mbit/s.
The cache on the fast tier holds a quarter of the data; a step takes so long that the run reads 80% of what the slow tier
gives (``--load``; above 1 the tier cannot keep up, and the forecast has something to tell). A rank with one loader worker reads
the steps of three epochs and sleeps in place of computing. Documents carry metadata, so that a shard has some 60 bytes a
token: two CPU cores could not pack the tokens of a bare store at the rate of a disk.

In place: the same steps with the data on the fast disk; what is left of the waiting is the loader's own. On demand: a shard
is fetched when a row asks for it, and the one asked for longest ago makes room (``on_demand``): when the run asks for the step,
or with as many steps read ahead as by loader workers. Waiting counts from the second step on; the first waits for the process
to start and for the first shards, and is told apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_proxy import FaultProxy, s3_server, s3_storage  # noqa: E402
from token_stores import Dataset, layout, make_dataset, stored  # noqa: E402

from outgrow.contracts import JobSpec, ShardCounts  # noqa: E402
from outgrow.recipes.mix import Mix  # noqa: E402
from outgrow.recipes.schema import Recipe  # noqa: E402
from outgrow.recipes.schema.site import Site  # noqa: E402
from outgrow.streaming.loader import build_loader  # noqa: E402
from outgrow.streaming.read_ahead import read_ahead_depth  # noqa: E402
from outgrow.streaming.rows import RowIndex  # noqa: E402
from outgrow.streaming.sampler import Sampler  # noqa: E402
from outgrow.streaming.steps import PackedStep, ReadPlan, SplitReader  # noqa: E402
from outgrow.streaming.tiers.forecast import Assumptions, look_ahead  # noqa: E402
from outgrow.streaming.tiers.on_demand import open_dataset  # noqa: E402
from outgrow.streaming.tiers.simulate import Forecast  # noqa: E402

LENGTH = 2048
EPOCHS = 3
CACHE = 0.25
WINDOW_SHARDS = 4
META_BYTES = 40_000


@dataclass(frozen=True, kw_only=True)
class Line:
    """A slow tier: what it gives, and the size of the dataset that is read from it."""

    name: str
    bytes_per_s: float
    shard_bytes: int
    num_shards: int
    rows: int


LINES = {
    "disk": Line(name="disk", bytes_per_s=150e6, shard_bytes=8 * 2**20, num_shards=96, rows=32),
    "100mbit": Line(name="100mbit", bytes_per_s=12.5e6, shard_bytes=2**20, num_shards=96, rows=4),
}


@dataclass(frozen=True, kw_only=True)
class Waited:
    """Seconds that the run waited for its first step, and for the ``steps - 1`` others of ``step_s`` each."""

    first_s: float
    wait_s: float
    step_s: float
    steps: int
    counts: ShardCounts | None = None

    @property
    def share(self) -> float:
        """Of the time that the steps take."""
        return self.wait_s / (self.step_s * (self.steps - 1))


def make(root: Path, line: Line) -> Dataset:
    rng = np.random.default_rng(0)
    documents: list[Any] = []
    num_documents = line.num_shards * line.shard_bytes // (META_BYTES + 1200)
    for number in range(num_documents):
        tokens = rng.integers(0, 1000, int(rng.integers(300, 900)))
        meta = json.dumps({"text": rng.bytes(META_BYTES // 2).hex()})
        documents.append(stored(tokens, source=f"d{number}", meta=meta))
    return make_dataset(
        root,
        {"text": (documents, [])},
        sequence_length=LENGTH,
        window_shards=WINDOW_SHARDS,
        shard_bytes=line.shard_bytes,
    )


def shard_bytes(dataset: Dataset) -> int:
    return sum(path.stat().st_size for path in dataset.store.rglob("*.mds"))


@contextmanager
def sites(dataset: Dataset, line: Line, root: Path) -> Iterator[dict[str, Any]]:
    """The site of a run whose dataset lies behind ``line``, as plain data."""
    room = f"{round(shard_bytes(dataset) * CACHE)} B"
    fast = {"name": "fast", "path": str(root / "fast"), "run_cache": room, "reserve": "1 GB"}
    site: dict[str, Any] = {"schema": 1, "cache": str(root / "cache"), "storage": str(dataset.root), **unwatched(root)}
    if line.name == "disk":
        limit = f"{line.bytes_per_s / 1e6:.0f} MB/s"
        yield {**site, "tiers": [fast, {"name": "slow", "path": str(dataset.root), "limit": limit, "speed": limit}]}
        return
    with s3_server() as server, FaultProxy(server) as proxy:
        upload(dataset, server)
        proxy.throttle(line.bytes_per_s)
        options = {"key": "test", "secret": "test", "endpoint_url": proxy.url}
        slow = {"name": "slow", "path": "s3://bucket/data", "options": options, "speed": f"{line.bytes_per_s / 1e6} MB/s"}
        yield {**site, "storage": "s3://bucket/data", "storage_options": options, "tiers": [fast, slow]}


def in_place(dataset: Dataset, root: Path) -> dict[str, Any]:
    site = Site.model_validate({"storage": str(dataset.root), "cache": str(root / "cache"), **unwatched(root)})
    return site.to_dict()


def unwatched(root: Path) -> dict[str, Any]:
    """Keys of a site without a node agent, whose records lie in a place of their own."""
    return {"monitoring": {"agent": False, "folder": str(root / "monitoring")}}


def upload(dataset: Dataset, server: str) -> None:
    storage = s3_storage(server)
    storage.fs.put(str(dataset.root / "datasets"), "bucket/data/datasets", recursive=True)


def job_of(dataset: Dataset, line: Line, site: dict[str, Any]) -> JobSpec:
    job = dataset.job(rows=line.rows, workers=1, duration={"epochs": EPOCHS})
    return replace(job, site=Site.model_validate(site).to_dict())


def run(steps: Iterator[Any], step_s: float, count: int) -> Waited:
    """Take ``count`` steps, each of which then takes ``step_s``."""
    waits = []
    for _ in range(count):
        start = time.perf_counter()
        next(steps)
        waits.append(time.perf_counter() - start)
        time.sleep(step_s)
    return Waited(first_s=waits[0], wait_s=sum(waits[1:]), step_s=step_s, steps=count)


def with_prefetcher(job: JobSpec, line: Line, step_s: float, count: int) -> Waited:
    loader = build_loader(job, layout(1, line.rows, line.rows), 0, start_step=0, stop_step=count, attempt="a")
    waited = run(iter(loader), step_s, count)
    time.sleep(1.2)  # counts are written once a second
    counts = loader.shard_counts()
    loader.close()
    return replace(waited, counts=counts)


def without(job: JobSpec, line: Line, step_s: float, count: int, *, ahead: bool) -> Waited:
    """Shards are fetched as rows ask for them; ``ahead``: by another thread, as many steps ahead as loader workers read."""
    plan = plan_of(job, line)
    with open_dataset(Site.model_validate(job.site), job.card) as dataset:
        index = RowIndex.open(dataset.store / Path(job.card.indexes[0].folder).relative_to(job.card.store))
        documents = [dataset.documents(stream.name, "train", open_shards=WINDOW_SHARDS + 2) for stream in index.train]
        reader, sampler = SplitReader(plan, index, "train", documents), Sampler([index], plan.mix, plan.seed)
        steps = (reader.read(step, sampler.phase(step).epoch, sampler.row_ids(step)) for step in range(count))
        if not ahead:
            return run(steps, step_s, count)
        taken: queue.Queue[PackedStep] = queue.Queue(maxsize=read_ahead_depth(plan))
        thread = threading.Thread(target=lambda: [taken.put(step) for step in steps])
        thread.start()
        waited = run(iter(taken.get, None), step_s, count)
        thread.join()
    return waited


def plan_of(job: JobSpec, line: Line) -> ReadPlan:
    mix = Mix.of(Recipe.model_validate(job.recipe), job.card)
    seed = job.recipe["run"]["seed"]
    return ReadPlan(store="", indexes=(), mix=mix, layout=layout(1, line.rows, line.rows), rank=0, seed=seed, fill_token=0)


def forecast(job: JobSpec, step_s: float) -> Forecast:
    given = Assumptions(step_s=step_s, steps=None, cache=None, bytes_per_s={}, latency_s={"slow": 0.0})
    return look_ahead(Recipe.model_validate(job.recipe), Site.model_validate(job.site), job.card, given).prefetched


def measure(line: Line, load: float, root: Path) -> Iterator[str]:
    dataset = make(root / "slow", line)
    size, num_shards = shard_bytes(dataset), len(list(dataset.store.rglob("*.mds")))
    with sites(dataset, line, root) as site:
        job = job_of(dataset, line, site)
        count = Mix.of(dataset.recipe(rows=line.rows), dataset.card).steps_per_epoch * EPOCHS
        step_s = size * EPOCHS / count / (load * line.bytes_per_s)
        yield f"\n## {line.name}: {line.bytes_per_s / 1e6:.1f} MB/s, of which the run reads {load:.0%}\n"
        yield f"{size / 1e6:.0f} MB in {num_shards} shards, {count} steps of {step_s * 1e3:.1f} ms.\n"
        yield "| | waited, share of the steps' time | first step | shards fetched | hits | the reader waited for shards |"
        yield "|---|---|---|---|---|---|"
        expected = forecast(job, step_s)
        real = with_prefetcher(job, line, step_s, count)
        assert real.counts is not None
        found = f"{real.counts.fetches} | {real.counts.hits} of {real.counts.visits} | {real.counts.wait_s:.2f} s"
        yield f"| with the prefetcher | {real.share:.2%} | {real.first_s:.2f} s | {found} |"
        share = expected.stall_s / (step_s * (count - 1))
        found = f"{expected.fetches} | {expected.hits} of {expected.visits} | {expected.start_s + expected.stall_s:.2f} s"
        yield f"| its forecast | {share:.2%} | {expected.start_s:.2f} s | {found} |"
        local = with_prefetcher(replace(job, site=in_place(dataset, root)), line, step_s, count)
        yield f"| in place | {local.share:.2%} | {local.first_s:.2f} s | | | |"
        for ahead, words in ((True, "on demand, read ahead"), (False, "on demand")):
            waited = without(job, line, step_s, count, ahead=ahead)
            yield f"| {words} | {waited.share:.2%} | {waited.first_s:.2f} s | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--line", action="append", choices=sorted(LINES))
    parser.add_argument("--load", type=float, default=0.8, help="bytes that the steps read of those that the slow tier gives")
    given = parser.parse_args()
    print(f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}")
    for name in given.line or sorted(LINES):
        with tempfile.TemporaryDirectory() as folder:
            for text in measure(LINES[name], given.load, Path(folder)):
                print(text, flush=True)


if __name__ == "__main__":
    main()
