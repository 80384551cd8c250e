"""One start of a run as its ranks record it: the rank's record, opened before anything else, and the facts beside it.

Where the folder of records cannot be written, the run goes on without: the record lies in memory then, and what of it goes into
``events.jsonl`` is as ever.
"""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch

import outgrow
from outgrow.contracts import Context, JobSpec, JsonDict, Layout
from outgrow.errors import OutgrowError, RestartError
from outgrow.monitoring import events
from outgrow.monitoring.event_files import has_lines
from outgrow.monitoring.recording.attempt import AttemptFacts, attempt_folder, node_folder, records_folder, write_facts
from outgrow.monitoring.recording.recorder import Before, Recorder
from outgrow.monitoring.recording.slots import RestartCause
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.options import without_credentials
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.bring_up import Started
from outgrow.trainers.by_rank_0 import by_rank_0
from outgrow.trainers.ceilings import Arithmetic, vendor_flops
from outgrow.trainers.checkpoint.resume import gather_texts

if TYPE_CHECKING:
    from outgrow.streaming.lost_shards import LostShard


@dataclass
class Attempt:
    """This start on this rank. ``folder`` is where the node's ranks record it; ``unrecorded`` says why they do not."""

    job: JobSpec
    context: Context
    site: Site
    started: float
    before: Before | None
    folder: Path
    recorder: Recorder
    unrecorded: str

    @property
    def stalls(self) -> Path:
        """Where it is written what the node's ranks did when a step stalled."""
        return node_folder(self.site) / "stalls" / run_label(self.job)

    @property
    def calls_agent(self) -> bool:
        """Whether this rank is the one of its node that sees to an agent."""
        return self.site.monitoring.agent and not self.context.local_rank

    def cause(self, step: int) -> RestartCause | None:
        """Why the run was started again, this time to go on from ``step``; None at its first start."""
        if self.context.cause:
            return self.context.cause
        return "resumed" if step or self.before else None

    def write(self, facts: AttemptFacts) -> None:
        """Put the facts where the node's agent finds them. One rank of the node does."""
        if self.unrecorded or self.context.local_rank:
            return
        try:
            write_facts(self.folder, facts)
        except OSError as error:
            self.unrecorded = str(error)


def call_agent(attempt: Attempt) -> str:
    """See to it that the node has an agent where the site wants one; what came of it, for a person. For one rank of a node."""
    if not attempt.calls_agent:
        return ""
    from outgrow.monitoring.agent.start import ensure_agent

    return ensure_agent(attempt.site)


def lookout(attempt: Attempt) -> AbstractContextManager[object]:
    """While it is open, an agent that was killed is followed by another."""
    if not attempt.calls_agent:
        return nullcontext()
    from outgrow.monitoring.agent.lookout import Lookout

    return closing(Lookout(attempt.site))


@contextmanager
def recorded(job: JobSpec, context: Context, storage: Storage) -> Iterator[Attempt]:
    """This start, recorded from here until the block is left, and how that was. A collective."""
    attempt = _open(job, context, storage)
    recorder = attempt.recorder
    try:
        yield attempt
    except Exception as error:
        # What outgrow itself says is wrong stays wrong; anything else, such as a lost neighbour, is tried once more at least.
        final = isinstance(error, OutgrowError) and not isinstance(error, RestartError)
        recorder.close("failed" if final else "restarting")
        raise
    except BaseException:  # Ctrl-C, or an exit that was asked for
        recorder.close("interrupted")
        raise
    recorder.close("finished")


def _open(job: JobSpec, context: Context, storage: Storage) -> Attempt:
    site = Site.model_validate(job.site)
    node = node_folder(site)
    run = run_label(job)
    runs = records_folder(node) / run
    # Where nothing was ever said of the run, the records here are of another of the same name that was cleared away.
    started, goes_on = by_rank_0(context.rank, lambda: (_start_time(runs), has_lines(storage, job.run.folder)))
    before = _before(storage, job.run.folder, runs, context.rank) if goes_on else None
    folder = attempt_folder(node, run, started, context.attempt)
    make = partial(
        Recorder, rank=context.rank, launched=job.launched, before=before, stall_after_s=site.monitoring.stall_after_s
    )
    try:
        recorder, unrecorded = make(folder), ""
    except OSError as error:
        recorder, unrecorded = make(None), str(error)
    return Attempt(job, context, site, started, before, folder, recorder, unrecorded)


def run_label(job: JobSpec) -> str:
    """The run folder's own name: the value of the label ``run``, and the folder of its records."""
    return PurePosixPath(job.run.folder).name


def _start_time(runs: Path) -> float:
    """Now, or just after the newest start here where the machine's clock was set back since: starts sort by time."""
    try:
        newest = max((int(path.name.partition("-")[0]) for path in runs.iterdir()), default=0)
    except (OSError, ValueError):
        newest = 0
    return max(time.time(), (newest + 1) / 1000)


def _before(storage: Storage, run_folder: str, runs: Path, rank: int) -> Before | None:
    """What earlier starts have left for ``rank``: its newest record on this node, or, where rank 0 ran on another node since,
    what it said in ``events.jsonl``."""
    here = Before.of_records(runs, rank)
    told = events.newest_counters(storage, run_folder) if rank == 0 else None
    elsewhere = Before.of_counters(*told) if told else None
    if here is None or (elsewhere is not None and elsewhere.touched > here.touched):
        return elsewhere
    return here


def facts_of(attempt: Attempt, layout: Layout, device: torch.device, arithmetic: Arithmetic, steps: int) -> AttemptFacts:
    """What does not change while this start goes on. A collective."""
    job, site, context = attempt.job, attempt.site, attempt.context
    recipe = Recipe.model_validate(job.recipe)
    gpus = _gpus(context, device)
    name = device_name(device)
    return AttemptFacts(
        run=run_label(job),
        name=job.run.name,
        folder=job.run.folder,
        fingerprint=job.run.fingerprint,
        storage=without_credentials(site.storage),
        attempt=context.attempt,
        started=attempt.started,
        host=socket.gethostname(),
        world=context.world,
        local_ranks=tuple(sorted(gpus)),
        steps=steps,
        rows=recipe.batch.rows,
        sequence_length=recipe.data.sequence_length,
        checkpoint_every_steps=recipe.checkpoint.every_steps,
        engine=layout.engine,
        device=device.type,
        device_name=name,
        precision=recipe.precision,
        parameters=arithmetic.parameters,
        flops_per_token=arithmetic.flops_per_token(recipe.data.sequence_length),
        vendor_flops=site.device_flops or vendor_flops(name, recipe.precision),
        gpu_hour_usd=site.prices.gpu_hour,
        stall_after_s=site.monitoring.stall_after_s,
        shard_counts="",
        tiers=_disks(site),
        gpus={str(rank): gpu for rank, gpu in gpus.items() if gpu},
        versions={
            "outgrow": outgrow.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    )


def told_start(
    attempt: Attempt,
    facts: AttemptFacts,
    layout: Layout,
    device: torch.device,
    started: Started,
    lost: Sequence[LostShard],
) -> JsonDict:
    """What the event of a start says; it counts as a restart from here on, where it is one."""
    cause = attempt.cause(started.progress.step)
    if cause is not None and attempt.context.rank == 0:
        attempt.recorder.restarted(cause)
    detail = {
        "world": layout.world,
        "layout": layout.to_dict(),
        "device": str(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "refused_checkpoints": {refused.folder: refused.reason for refused in started.refused},
        "cause": cause or "",
        "facts": facts.to_dict(),
    }
    if attempt.unrecorded:
        detail["unrecorded"] = attempt.unrecorded
    if lost:
        detail["lost_shards"] = [shard.to_dict() for shard in lost]
    return detail


def _gpus(context: Context, device: torch.device) -> dict[int, str]:
    """The ranks of this node and the UUID of each one's GPU, empty on a CPU. A collective."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
    everyone = map(json.loads, gather_texts(json.dumps([context.node_rank, gpu])))
    return {rank: gpu for rank, (node, gpu) in enumerate(everyone) if node == context.node_rank}


def device_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _disks(site: Site) -> dict[str, str]:
    """Folders of the tiers on disk by name, that of ``storage`` among them."""
    found = {tier.name: str(Path(tier.path).expanduser()) for tier in site.tiers if not tier.is_bucket}
    storage = site.open_storage()
    return found if not storage.is_local else {"storage": storage.path(""), **found}
