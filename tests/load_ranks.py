"""Ranks that load a folder of weights, watched from outside: the memory of each, sampled every 10 ms until it has loaded.

    python tests/load_ranks.py RANK FOLDER

is one rank; ``FOLDER/case.json`` says what it does, and ``FOLDER/rank-N.json`` what it holds afterwards. RssAnon and RssFile
are those of ``/proc/<pid>/status``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CGROUP = Path("/sys/fs/cgroup")
_SAMPLE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """``method`` is full, lora or nf4; more than one rank is FSDP2. ``limit_bytes`` bounds each rank by a cgroup; 0: none."""

    base: str
    cache: str
    method: str = "full"
    optimizer: str = "adamw"
    precision: str = "bf16"
    world: int = 1
    limit_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Bytes of one rank: ``before`` it loads, at its ``peak``, what it holds in the end (``shard``), and its most file pages.

    ``peak`` and ``before`` are anonymous memory; ``seconds`` is the time from ``before`` on.
    """

    before: int
    peak: int
    shard: int
    files: int
    seconds: float

    @property
    def overhead(self) -> int:
        """Peak less the shard: all of the process, Python and torch too."""
        return self.peak - self.shard


def load(case: Case, folder: Path) -> list[Loaded]:
    """What ``case`` took on each of its ranks. ``AssertionError`` where a rank fails, as when its cgroup has too little."""
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(cgroup(case.limit_bytes)) for _ in range(case.world)] if case.limit_bytes else []
        ranks = stack.enter_context(started(case, folder, groups))
        samples = _watch(ranks)
    codes = [process.returncode for process in ranks]
    assert not any(codes), f"a rank failed: {codes}\n" + "".join(
        (folder / f"rank-{r}.log").read_text()[-2000:] for r in range(case.world)
    )
    return [_loaded(json.loads((folder / f"rank-{rank}.json").read_text()), samples[rank]) for rank in range(case.world)]


@contextlib.contextmanager
def started(case: Case, folder: Path, groups: Sequence[Path] = ()) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks of ``case``, each in its cgroup where there are ``groups``; killed in the end."""
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    ranks = [_start(rank, folder, groups) for rank in range(case.world)]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup of ``limit_bytes``, of version 1 or 2. Raises ``OSError`` where none can be made."""
    v1 = CGROUP / "memory"
    above = v1 if v1.is_dir() else CGROUP
    group = above / f"outgrow-test-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def can_limit_memory() -> bool:
    """Whether this machine lets us bound the memory of a process by a cgroup."""
    try:
        with cgroup(1 << 30):
            return True
    except OSError:
        return False


def _start(rank: int, folder: Path, groups: Sequence[Path]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, str(rank), str(folder)]
    if groups:  # the shell enters the group before it becomes the rank
        command = ["/bin/sh", "-c", f'echo $$ > {groups[rank]}/cgroup.procs && exec "$@"', "rank", *command]
    with open(folder / f"rank-{rank}.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _watch(ranks: list[subprocess.Popen[bytes]]) -> list[list[tuple[float, int, int]]]:
    """(time, RssAnon, RssFile) of every rank until all have ended, or one has failed."""
    samples: list[list[tuple[float, int, int]]] = [[] for _ in ranks]
    while any(process.poll() is None for process in ranks) and not any(process.returncode for process in ranks):
        for process, seen in zip(ranks, samples, strict=True):
            with contextlib.suppress(OSError, KeyError):
                seen.append((time.time(), *_resident(process.pid)))
        time.sleep(_SAMPLE_S)
    return samples


def _resident(pid: int | str) -> tuple[int, int]:
    """RssAnon and RssFile of a process, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def _present(start: int, num_bytes: int) -> int:
    """How many of some bytes of this process are in memory: zeros that nobody has touched are not."""
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = start // page, -(-(start + num_bytes) // page)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        flags = np.frombuffer(os.pread(file.fileno(), 8 * (last - first), 8 * first), np.uint64)
    return min(int(np.count_nonzero(flags >> 63)) * page, num_bytes)


def _loaded(told: dict[str, Any], samples: list[tuple[float, int, int]]) -> Loaded:
    during = [(anon, files) for at, anon, files in samples if told["began"] <= at <= told["ended"]]
    return Loaded(
        before=told["before"],
        peak=max(told["after"], *(anon for anon, _ in during)),
        shard=told["shard"],
        files=max(files for _, files in during),
        seconds=told["ended"] - told["began"],
    )


def _main(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from outgrow.torchvision import ensure_importable

    ensure_importable()
    from outgrow.contracts import Layout
    from outgrow.processes import end_rank
    from outgrow.recipes.schema import Recipe
    from outgrow.recipes.schema.site import Site
    from outgrow.trainers.adapters.lora import adapt
    from outgrow.trainers.adapters.nf4 import attach_quant_states, quantised_layers
    from outgrow.trainers.bring_up import first_weights
    from outgrow.trainers.engines import make_engine
    from outgrow.trainers.models import quantising  # noqa: F401 (so that what it imports counts as there before)
    from outgrow.trainers.models.build import checked_config, folder_config, meta_model

    torch.set_num_threads(1)
    case = Case(**json.loads((folder / "case.json").read_text()))
    site = Site.model_validate({"schema": 1, "cache": case.cache, "sources": {"base": case.base}})
    recipe = Recipe.model_validate(_recipe(case))
    if case.world > 1:
        store = dist.FileStore(str(folder / f"store-{case.method}"), case.world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.world)
    config = checked_config(folder_config(Path(case.base)), case.base)
    device = torch.device("cpu")
    before, began = _resident("self")[0], time.time()
    model = meta_model(config, recipe.precision)
    adapt(model, recipe)
    layout = Layout(
        engine="fsdp2" if case.world > 1 else "plain",
        world=case.world,
        replicate=1,
        shard=case.world,
        global_rows=case.world,
        micro_rows=1,
        accumulation=1,
    )
    engine = make_engine(layout, recipe, model, device)
    weights = first_weights(recipe, site, config, model, device)
    engine.load_model(weights)
    if case.method == "nf4":
        attach_quant_states(model, weights.base, device)  # type: ignore[attr-defined]
    ended, after = time.time(), _resident("self")[0]
    tensors = [*model.parameters(), *model.buffers(), *engine.tensors().values()]
    for _, layer in quantised_layers(model):
        state = layer.quant_state
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    # Each piece of memory once: a master and what computes may be the same.
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    held = {memory.data_ptr(): memory.nbytes() for memory in (tensor.untyped_storage() for tensor in local)}
    shard = sum(_present(start, num_bytes) for start, num_bytes in held.items())
    told = {"before": before, "after": after, "began": began, "ended": ended, "shard": shard}
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    end_rank(0)


def _recipe(case: Case) -> dict[str, Any]:
    adapters = {
        "full": {"kind": "none"},
        "lora": {"kind": "lora", "rank": 8},
        "nf4": {"kind": "lora", "rank": 8, "base": "nf4"},
    }
    return {
        "schema": 1,
        "run": {"name": "load", "seed": 1},
        "model": {"kind": "folder", "path": "base"},
        "adapter": adapters[case.method],
        "data": {
            "sequence_length": 64,
            "tokenizer": {"kind": "folder", "path": "none"},
            "streams": [{"name": "none", "source": {"kind": "text", "path": "none"}}],
        },
        "batch": {"rows": case.world},
        "duration": {"steps": 1},
        "optimizer": {"kind": case.optimizer, "learning_rate": 1e-4},
        "schedule": {"kind": "constant"},
        "precision": case.precision,
    }


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
