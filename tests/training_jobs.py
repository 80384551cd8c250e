"""Jobs for ``train_worker``: a tiny Llama on a token store of known documents, and what such a run wrote down."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from token_stores import Dataset, documents, make_dataset

from outgrow.contracts import Context, JobSpec, JsonDict, Loader, RunRef, ShardCounts, StepRecord, StepRows, WorkerResult
from outgrow.monitoring.events import read_events
from outgrow.storage import Storage

TRAIN_WORKER = "outgrow.trainers.loop:train_worker"
CONFIG = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
RECIPE: dict[str, Any] = {
    "model": {"kind": "architecture", "family": "llama", "config": CONFIG},
    "precision": "fp32",
    "optimizer": {"kind": "adamw", "learning_rate": 0.01},
    "schedule": {"kind": "constant", "warmup_steps": 3},
    "checkpoint": {"every_steps": 4, "keep_newest": 3},
    "validation": {"every_steps": 6},
    "logging": {"every_steps": 1},
}


def two_streams(root: Path) -> Dataset:
    """Two streams, weighted in part, whose rows divide by nothing; held-out documents in both."""
    return make_dataset(
        root,
        {
            "a": (documents(1, 61, weighted=True), documents(2, 7)),
            "b": (documents(3, 23), documents(4, 5)),
        },
    )


def job(dataset: Dataset, run: str, steps: int, *, workers: int = 1, loader_workers: int = 0, **recipe: Any) -> JobSpec:
    """``steps`` optimizer steps of 7 rows in the run folder ``runs/<run>``."""
    base = dataset.job(rows=7, workers=loader_workers, duration={"steps": steps})
    folder = f"runs/{run}"
    (dataset.root / folder).mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(
        base,
        recipe={**base.recipe, **RECIPE, **recipe},
        run=RunRef(name=run, folder=folder, fingerprint=run),
        workers=workers,
    )


def records(dataset: Dataset, run: str, kind: str) -> list[StepRecord]:
    """What the run wrote to its ``events.jsonl``, in order, of one kind."""
    return [r for r in read_events(Storage(str(dataset.root)), f"runs/{run}") if r.kind == kind]


def curve(dataset: Dataset, run: str) -> dict[int, tuple[float | None, float | None]]:
    """Loss and gradient norm by step; of a step that was trained twice, the later."""
    return {r.step: (r.loss, r.grad_norm) for r in records(dataset, run, "step")}


def explodes(*, step: int, steps: int, at: int) -> float:
    """A custom schedule that goes wrong at step ``at`` (from 0)."""
    return 1.0 if step < at else 1e30


def dies(*, step: int, steps: int, at: int, rank: int, once: str) -> float:
    """A custom schedule that kills its rank at step ``at`` (from 0), unless the file ``once`` is there already."""
    if step == at and os.environ.get("RANK", "0") == str(rank) and not Path(once).exists():
        Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


# --- which rows a run really read -------------------------------------------------------------------------------------


@dataclasses.dataclass
class NotingLoader:
    """A loader that writes down the rows of each step as they are handed to this rank."""

    loader: Loader
    notes: Path
    rank: int

    def __iter__(self) -> Iterator[StepRows]:
        for rows in self.loader:
            own = [row for batch in rows.micro_batches for row in batch.row_ids.tolist() if row >= 0]
            length = rows.micro_batches[0].token_ids.shape[1]
            tokens = sum(int((batch.segments >= 0).sum()) for batch in rows.micro_batches)
            note = {"step": rows.step, "length": length, "rank": self.rank, "rows": own, "tokens": tokens}
            with self.notes.open("a") as file:
                file.write(json.dumps(note) + "\n")
            yield rows

    def state(self, next_step: int) -> JsonDict:
        return self.loader.state(next_step)

    def close(self) -> None:
        self.loader.close()

    def shard_counts(self) -> ShardCounts | None:
        return self.loader.shard_counts()

    def shard_counts_file(self) -> str:
        return self.loader.shard_counts_file()

    def ready_steps(self) -> int | None:
        return self.loader.ready_steps()


def train_and_note_rows(job: JobSpec, context: Context) -> WorkerResult:
    """``train_worker``, with a file a start and rank in the run folder that says what was read."""
    from outgrow.streaming import loader
    from outgrow.trainers.loop import train_worker

    notes = Path(job.site["storage"]) / job.run.folder / f"rows-{context.world}-{context.attempt}-{context.rank}.jsonl"
    build = loader.build_loader
    loader.build_loader = lambda *args, **steps: NotingLoader(build(*args, **steps), notes, context.rank)
    try:
        return train_worker(job, context)
    finally:
        loader.build_loader = build


def noted_rows(dataset: Dataset, run: str, world: int) -> dict[int, tuple[int, list[int]]]:
    """Length and ordered rows by step, as the starts of a run on ``world`` ranks read them; a step that some rank did not come
    to before it was killed is left out."""
    steps: dict[int, dict[int, JsonDict]] = {}
    for path in (dataset.root / "runs" / run).glob(f"rows-{world}-*.jsonl"):
        for note in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(note["step"], {})[note["rank"]] = note
    return {
        step: (notes[0]["length"], _dealt_back([notes[rank]["rows"] for rank in range(world)]))
        for step, notes in sorted(steps.items())
        if len(notes) == world
    }


def _dealt_back(ranks: list[list[int]]) -> list[int]:
    """The rows of a step in order: row j was on rank j mod world."""
    return [ranks[place % len(ranks)][place // len(ranks)] for place in range(sum(map(len, ranks)))]
