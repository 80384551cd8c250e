"""What is known of each rank on this node: from its record, and from the system about its process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outgrow.monitoring import metrics
from outgrow.monitoring.agent.host import process_cpu_s, process_memory
from outgrow.monitoring.agent.run_state import ENDED, said
from outgrow.monitoring.agent.samples import Sample
from outgrow.monitoring.agent.scan import RankView, RunView
from outgrow.monitoring.recording.slots import PHASES

_SLOTS = (
    (metrics.RANK_STEP, "step"),
    (metrics.RANK_LAST_PROGRESS_TIME, "touched"),
    (metrics.RANK_LOSS, "rank_loss"),
    (metrics.RANK_LOADER_READY, "loader_ready"),
)
_DEVICE_MEMORY = ("allocated", "reserved", "peak")


class RankSource:
    """Life, progress, phases, memory and processor time of every rank on this node."""

    part = "ranks"

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        for run in runs:
            for rank in run.ranks.values():
                labels = (run.facts.run, run.facts.host, str(rank.rank))
                yield from _recorded(labels, rank, on_gpu=run.facts.device != "cpu")
                if rank.alive:
                    yield from _of_process(labels, int(rank.record["pid"]))


def _recorded(labels: tuple[str, str, str], rank: RankView, *, on_gpu: bool) -> Iterator[Sample]:
    if rank.alive or said(rank.record) not in (*ENDED, "restarting"):
        yield Sample(metrics.RANK_UP, labels, rank.alive)
    for metric, slot in _SLOTS:
        yield Sample(metric, labels, rank.record[slot])
    for phase in PHASES:
        yield Sample(metrics.RANK_PHASE_SECONDS, (*labels, phase), rank.record[f"phase_s.{phase}"])
    if on_gpu:
        yield Sample(metrics.RANK_ALLOCATION_RETRIES, labels, rank.record["allocation_retries"])
    for kind in _DEVICE_MEMORY if rank.alive else ():
        yield Sample(metrics.RANK_MEMORY, (*labels, kind), rank.record[f"memory_{kind}"])


def _of_process(labels: tuple[str, str, str], pid: int) -> Iterator[Sample]:
    for kind, num_bytes in process_memory(pid).items():
        yield Sample(metrics.RANK_MEMORY, (*labels, kind), num_bytes)
    yield Sample(metrics.RANK_CPU_SECONDS, labels, process_cpu_s(pid))
