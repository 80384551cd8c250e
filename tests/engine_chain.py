"""One training handed from engine to engine through committed checkpoints; run as a script it is one rank of several.

    python tests/engine_chain.py RANK FOLDER

reads ``FOLDER/legs.json``, a list of legs: a ``Case`` as a dict, and how many steps it trains. The ranks of each leg meet
through files in the folder, take up the newest checkpoint there, train, and save; rank 0 writes ``FOLDER/results.json``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import Case, born_engine, rows_of_steps, run_ranks, trained_steps, whole

from outgrow.processes import end_rank
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.resume import resume
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.engines import Engine

RUN = "runs/chain"


@dataclass(frozen=True, kw_only=True)
class Leg:
    """``case`` for ``steps`` steps of the one training that all legs make up."""

    case: Case
    steps: int


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What a leg came to: losses and norms of its steps, and digests of all that a checkpoint keeps, as taken up and as
    left."""

    losses: list[float]
    norms: list[float]
    taken_up: str
    left: str


def run_chain(legs: Sequence[Leg], folder: Path) -> list[Passed]:
    """The outcome of each leg, trained by as many processes as the widest asks for; fails with the first rank that fails."""
    (folder / "legs.json").write_text(json.dumps([asdict(leg) for leg in legs]))
    run_ranks(__file__, max(leg.case.world for leg in legs), folder)
    return [Passed(**passed) for passed in json.loads((folder / "results.json").read_text())]


def _pass(leg: Leg, first: int, rank: int, storage: Storage) -> Passed:
    """Train the steps from ``first`` on; the newest checkpoint holds all before them."""
    case = leg.case
    engine = born_engine(case)
    resumed = resume(storage, RUN, engine.load)
    assert (resumed.reader.step if resumed.reader else 0) == first
    taken_up = _digest(engine)
    steps = rows_of_steps()[first : first + leg.steps]
    pairs = list(trained_steps(engine, case, rank, steps, first))
    saver = Checkpointer(
        storage, Group(RUN, f"leg-{first}", rank, case.world), engine.tensors(), Retention(newest=99, best=0), patience_s=120
    )
    saver.save(engine.tensors(), StepState(step=first + leg.steps, loader_state={}, recipe={}, metrics={}))
    saver.wait()
    assert not [result.error for result in saver.results() if result.error]
    dist.barrier()
    saver.close()
    return Passed(
        losses=[loss for loss, _ in pairs], norms=[norm for _, norm in pairs], taken_up=taken_up, left=_digest(engine)
    )


def _digest(engine: Engine) -> str:
    """sha256 over all that a checkpoint keeps, whole, in the order of names: the same bits whatever the engine."""
    digest = hashlib.sha256()
    for name, held in sorted(engine.tensors().items()):
        digest.update(name.encode() + whole(held).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    legs = [_leg(told) for told in json.loads((folder / "legs.json").read_text())]
    outcomes, first = [], 0
    for number, leg in enumerate(legs):
        if rank < leg.case.world:
            store = dist.FileStore(str(folder / f"store-{number}"), leg.case.world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=leg.case.world)
            outcomes.append(asdict(_pass(leg, first, rank, Storage(str(folder / "storage")))))
            dist.destroy_process_group()
        else:
            _wait_for_step(folder, first + leg.steps)
        first += leg.steps
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(outcomes))
    end_rank(0)


def _wait_for_step(folder: Path, step: int) -> None:
    """A rank that has no part in a leg comes back when it is over."""
    while not (folder / f"storage/{RUN}/checkpoints/step-{step:08d}/COMMITTED").exists():
        time.sleep(0.05)


def _leg(told: dict[str, Any]) -> Leg:
    return Leg(case=Case(**told["case"]), steps=told["steps"])


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
