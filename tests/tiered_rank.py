"""A rank that reads steps through its node's prefetcher and notes the digest of each: a program without torch, soon started."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.contracts import Batch, JobSpec, Layout
from outgrow.streaming.access import open_access
from outgrow.streaming.read_ahead import Assignment, Worker
from outgrow.streaming.tiers.gate import Reads


def digest(rows: Any) -> str:
    """sha256 of every number and array of a step, ``StepRows`` or ``PackedStep``."""
    found = hashlib.sha256(repr((rows.step, rows.epoch, rows.row_ids, rows.global_weight, rows.tokens)).encode())
    for batch in rows.micro_batches:
        for field in dataclasses.fields(Batch):
            found.update(np.asarray(getattr(batch, field.name)).tobytes())
    return found.hexdigest()


def main(path: str) -> None:
    """Read what the file at ``path`` says, with one loader worker."""
    told = json.loads(Path(path).read_text())
    job, layout, start, stop = JobSpec.from_dict(told["job"]), Layout.from_dict(told["layout"]), told["start"], told["stop"]
    access = open_access(job, layout, told["rank"], attempt=told["attempt"])
    workers: list[Worker] = []

    def reads() -> Reads:
        return Reads(positions=tuple(worker.position for worker in workers) or (start,), stop=stop)

    with closing(access.join(layout.world, reads)), open(told["notes"], "a", buffering=1) as notes:
        workers.append(Worker(Assignment(plan=access.plan, number=0, first=start, stop=stop, stride=1), depth=4))
        with closing(workers[0]):
            for _ in range(start, stop):
                rows = workers[0].take()
                notes.write(json.dumps([rows.step, digest(rows)]) + "\n")
                time.sleep(told["step_s"])
