"""Processor time that recording costs the training loop: clock marks, the rank's record, and what is said on a logged step.

    python benchmarks/recording_cost.py [--micro-batches 8] [--cold] [--steps 4000]

The loop's own code on steps that do nothing, or, with --cold, that multiply a matrix and leave the processor's caches full
of it. Only the time of the loop's thread counts; writers of events and trackers have threads of their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from token_stores import documents, make_dataset  # noqa: E402

from outgrow.cluster.local import LocalContext  # noqa: E402
from outgrow.contracts import Batch, JsonDict, StepRows  # noqa: E402
from outgrow.monitoring.recording.recorder import Recorder  # noqa: E402
from outgrow.monitoring.trackers import open_trackers  # noqa: E402
from outgrow.storage import Storage  # noqa: E402
from outgrow.trainers.progress import Progress  # noqa: E402
from outgrow.trainers.records import Records  # noqa: E402
from outgrow.trainers.telemetry import Figures, Telemetry  # noqa: E402

LOGGED_EVERY = 10
ROWS, LENGTH = 64, 32
SIZE = 768


@dataclass
class Steps:
    """A loader whose rows are there at once."""

    num_steps: int
    micro_batches: int

    def __iter__(self) -> Iterator[StepRows]:
        nothing = torch.zeros(ROWS // self.micro_batches, LENGTH)
        batches = (Batch(**{field.name: nothing for field in fields(Batch)}),) * self.micro_batches
        ids, tokens = tuple(range(ROWS)), ROWS * LENGTH - 5
        return iter(
            [
                StepRows(step=step, epoch=0, row_ids=ids, global_weight=1.0, tokens=tokens, micro_batches=batches)
                for step in range(self.num_steps)
            ]
        )

    def state(self, next_step: int) -> JsonDict:
        return {}

    def close(self) -> None: ...

    def shard_counts(self) -> None: ...

    def shard_counts_file(self) -> str:
        return ""

    def ready_steps(self) -> int:
        return 3


def costs(folder: Path, steps: int, micro_batches: int, *, cold: bool) -> dict[bool, list[float]]:
    """Microseconds of each step, of logged ones under True."""
    recorder = Recorder(folder / "records", 0, launched=time.time(), before=None, stall_after_s=60.0)
    telemetry = Telemetry(recorder, Steps(steps, micro_batches), torch.device("cpu"), lambda length: 6e9 + length)
    context = LocalContext(rank=0, world=1, attempt="a", cause="", on_record=lambda record: None)
    recipe = make_dataset(folder / "dataset", {"a": (documents(1, 5), ())}).recipe().to_dict()
    storage = Storage(str(folder))
    (folder / "runs/r").mkdir(parents=True)
    progress = Progress()
    matrix = torch.sin(torch.arange(float(SIZE**2))).view(SIZE, SIZE)
    product = torch.empty_like(matrix)
    found: dict[bool, list[float]] = {True: [], False: []}
    with closing(
        Records(context, storage, "runs/r", steps, open_trackers(["tensorboard"], recipe, storage, "runs/r", folder))
    ) as records:
        rows_of = telemetry.steps()
        for number in range(steps):
            logged = number % LOGGED_EVERY == 0
            start = time.thread_time()
            rows = next(rows_of)
            for _ in rows.micro_batches:
                telemetry.mark("forward")
                telemetry.mark("backward")
            telemetry.mark("collectives")
            telemetry.mark("optimizer")
            telemetry.finish_step(rows)
            if logged:
                fields_of = telemetry.look(Figures(loss=2.0, rank_loss=2.1, grad_norm=1.0), 1e-3, records.dropped)
                records.say("step", progress, loss=2.0, grad_norm=1.0, learning_rate=1e-3, **fields_of)
            found[logged].append(1e6 * (time.thread_time() - start))
            if cold:
                torch.mm(matrix, matrix, out=product)
    recorder.close("finished")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = costs(Path(folder), given.steps, given.micro_batches, cold=given.cold)
    for logged, name in ((False, "other steps"), (True, "logged steps")):
        times = sorted(found[logged])
        tail = times[int(0.99 * len(times))]
        print(
            f"{name}: median {median(times):.1f} us, 99% {tail:.1f} us, {len(times)} steps, {given.micro_batches} micro-batches"
        )


if __name__ == "__main__":
    main()
