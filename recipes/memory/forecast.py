"""What a run takes of a device, of a node's memory and of its fastest disk: arithmetic of recipe, facts of a model and layout.

A device is fullest at one of a few moments: when the scores are there, when the last block works backwards beneath all
activations, when the first one does beside all gradients, when the gradients of embedding and head leave, or when the optimizer
steps; ``forecast`` gives the terms of the fullest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from outgrow.contracts import Forecast, Layout, ModelFacts
from outgrow.recipes.memory.activations import COMPUTE_BYTES, MASTER_BYTES, Activations, activations
from outgrow.recipes.memory.counts import Counts, Parts, count, states
from outgrow.recipes.memory.held import PACKED_BYTES, SCALE_BYTES, Held, held, zero_buffers
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.optimizer import AdamW8bit, Muon
from outgrow.recipes.schema.parallel import Fsdp2, Zero
from outgrow.recipes.schema.speed import ChunkedLogits

CONTEXT_BYTES = 700_000_000
"""What CUDA, cuBLAS and NCCL take of a device for themselves; 0.5 to 0.9 GB by card and driver."""
SLACK = 0.03
"""Share of its tensors that an allocator holds beside them, in pieces that nothing fits in."""
PROCESS_BYTES = {"cuda": 1_500_000_000, "cpu": 400_000_000}
"""Anonymous memory of a rank's process before it holds a tensor: Python, torch and, with CUDA, its driver."""
WORKER_BYTES = 250_000_000
"""Of a process that reads rows."""

UPDATE_PIECE = 1 << 22
"""Numbers whose moments in 8 bits are unpacked at a time."""


@dataclass(frozen=True)
class _Run:
    """All that the terms are worked out from."""

    recipe: Recipe
    facts: ModelFacts
    layout: Layout
    local_world: int
    device: str
    parts: Parts
    micro: Activations
    held: Held

    @property
    def compute(self) -> int:
        return COMPUTE_BYTES[self.recipe.precision]

    @property
    def exact(self) -> int:
        return MASTER_BYTES[self.recipe.precision]

    @property
    def share(self) -> float:
        """Of all ranks, those of one node."""
        return self.local_world / self.layout.world


def forecast(recipe: Recipe, facts: ModelFacts, layout: Layout, local_world: int, device: str) -> Forecast | None:
    """What a run takes with ``local_world`` ranks on each node; None where the model's shapes are not known.

    On ``cpu`` the terms of the device lie in the node's memory too, once for each of its ranks.
    """
    if not facts.shapes:
        return None
    parts = count(recipe, facts)
    micro = activations(recipe, facts, layout.micro_rows, device)
    run = _Run(recipe, facts, layout, local_world, device, parts, micro, held(recipe, facts, parts, layout, device))
    fullest = max(_moments(run), key=lambda moment: sum(moment.values()))
    fullest["allocator"] = SLACK * sum(fullest.values())
    if device == "cuda":
        fullest["context"] = CONTEXT_BYTES
    read, written = _traffic(run)
    return Forecast(
        device=_rounded(fullest),
        host=_rounded(_host(run)),
        disk=_rounded(_disk(run)),
        step_read_bytes=round(read),
        step_written_bytes=round(written),
    )


def _rounded(terms: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in terms.items() if round(value)}


# --- the device -------------------------------------------------------------------------------------------------------


def _moments(run: _Run) -> list[dict[str, float]]:
    """Bytes on the device by term at each of the moments when it may be fullest."""
    micro, own = run.micro, run.held
    gathered = _gathered(run)
    sums_before, (head, waiting) = (own.gradients if run.layout.accumulation > 1 else 0), _of_head(run)
    block, root = _passing(run)
    always = {"weights": own.weights, "optimizer": own.optimizer}
    unpacked = run.compute * _largest_packed(run)
    return [
        always | {"gathered": gathered.head, "gradients": sums_before, "activations": micro.kept, "scores": _scores(run)},
        always
        | {"gathered": gathered.block, "gradients": max(sums_before, head) + waiting + block}
        | {"activations": micro.kept + micro.working, "unpacked": unpacked},
        always
        | {"gathered": gathered.block, "gradients": own.gradients + (waiting if sums_before else 0) + block}
        | {"activations": micro.working, "unpacked": unpacked},
        always | {"gathered": gathered.end, "gradients": own.gradients + root},
        always | {"gradients": own.gradients, "update": _update(run)},
    ]


def _whole(run: _Run, counts: Counts) -> float:
    """Bytes of parameters as they are computed with."""
    return run.compute * (counts.trained + counts.frozen) + PACKED_BYTES * counts.packed


@dataclass(frozen=True)
class _Gathered:
    """Bytes of whole parameters that a rank holds beside its shards, at most: while the head computes, in the backward pass of
    a block, and when the last gradients leave."""

    head: float = 0.0
    block: float = 0.0
    end: float = 0.0


def _gathered(run: _Run) -> _Gathered:
    parts, settings = run.parts, run.recipe.parallel
    if run.layout.engine == "zero":
        least = max(_whole(run, parts.root) / 2, 2 * _whole(run, parts.block))
        whole = zero_buffers(run.recipe, run.layout, run.facts.largest_tensor, _whole(run, parts.whole), least)[0]
        return _Gathered(whole, whole, min(whole, _whole(run, parts.root)))
    if run.layout.engine != "fsdp2":
        return _Gathered()
    settings = settings if isinstance(settings, Fsdp2) else Fsdp2(kind="fsdp2")
    blocks = _whole(run, parts.whole) - _whole(run, parts.root)
    if settings.reshard_after_forward:  # a block and those that are gathered ahead
        blocks = min(blocks, (1 + settings.prefetch_blocks) * _whole(run, parts.block))
    outside, before_head = _whole(run, parts.outside), 0.0
    # What embedding and head share stays from its first use to its last; each by itself is let go after it, as blocks are.
    stays = outside if parts.outside == parts.root else 0
    if not settings.reshard_after_forward:
        stays, before_head = outside, _whole(run, parts.root) - outside
    return _Gathered(before_head + outside + blocks, stays + blocks)


def _passing(run: _Run) -> tuple[float, float]:
    """Bytes of gradients on their way to where they are summed, at most: while a block leaves, and while the rest does."""
    block, root = run.parts.block.trained, run.parts.root.trained
    if run.layout.engine == "zero":
        bucket = zero_buffers(run.recipe, run.layout, run.facts.largest_tensor, _whole(run, run.parts.whole), 0)[1]
        return bucket + run.compute * block, bucket + run.compute * root / 2
    if run.layout.engine != "fsdp2":
        copied = run.compute if run.recipe.precision == "bf16" else 0
        return copied * block / 4, copied * root / 2
    # As they are computed and, to be reduced, once more in float32. The head's come first: by itself they are on their way
    # while the last block computes its own, and what it shares with the embedding leaves last of all.
    outside = run.parts.outside.trained
    if run.parts.outside == run.parts.root:
        return (run.compute + run.exact) * block + run.compute * outside, (run.compute + run.exact) * outside
    return run.compute * block + run.exact * max(block, outside), (run.compute + run.exact) * outside


def _of_head(run: _Run) -> tuple[float, float]:
    """Bytes of the head's gradient, which is there before the last block works backwards: summed; or, where it is one with the
    embedding's, as it was computed, waiting for that beside what was summed before."""
    trained = run.parts.outside.trained if run.layout.engine in ("plain", "ddp") else 0
    return (0, run.compute * trained) if run.facts.tied_embeddings else (run.exact * trained, 0)


def _scores(run: _Run) -> float:
    """Bytes of the scores, and of the head's gradient where it is summed chunk by chunk before the backward pass."""
    trains_head = not isinstance(run.recipe.adapter, Lora) or any(
        "lm_head" in name or "embed" in name for name in run.facts.whole
    )
    in_chunks = isinstance(run.recipe.cross_entropy, ChunkedLogits) and trains_head
    return run.micro.scores + (run.exact * run.facts.vocab_size * run.facts.hidden_size if in_chunks else 0)


def _largest_packed(run: _Run) -> int:
    """Numbers of the largest weight that is unpacked from 4 bits to be multiplied with."""
    if not run.parts.whole.packed:
        return 0
    return max((prod(run.facts.shapes[name]) for name in run.facts.linear), default=0)


def _update(run: _Run) -> float:
    """Bytes that one parameter's update needs beside its states: both moments of a piece unpacked to float32 and on their way
    back to codes; Newton-Schulz's matrices."""
    facts, adapter = run.facts, run.recipe.adapter
    largest = facts.largest_tensor
    if isinstance(adapter, Lora):
        largest = max((adapter.rank * max(facts.shapes[name]) for name in facts.adapted), default=0)
        largest = max([largest, *(prod(facts.shapes[name]) for name in facts.whole)])
    if isinstance(run.recipe.optimizer, AdamW8bit):
        return 7 * run.exact * min(largest / run.layout.shard, UPDATE_PIECE)
    return 4 * run.exact * largest if isinstance(run.recipe.optimizer, Muon) else 0


# --- the node ---------------------------------------------------------------------------------------------------------


def _host(run: _Run) -> dict[str, float]:
    """Bytes of a node's memory by term, of all its ranks together."""
    processes = PROCESS_BYTES[run.device] + WORKER_BYTES * run.recipe.data.loader_workers
    terms: dict[str, float] = {"processes": processes * run.local_world}
    terms |= {name: a_rank * run.local_world for name, a_rank in run.held.host.items()}
    if run.micro.offloaded:
        terms["activations"] = run.micro.offloaded * run.local_world
    # A save copies what the ranks own into memory set aside for it; before that, at the start, weights pass tensor by tensor.
    saved = states(run.recipe, run.parts.whole) * run.share
    reading = 2 * run.exact * run.facts.largest_tensor * run.local_world
    return terms | ({"checkpoint": saved} if saved > reading else {"reading": reading})


def _disk(run: _Run) -> dict[str, float]:
    """Bytes on a node's first tier by term: 4-bit weights, kept so as not to be packed again, and what is offloaded."""
    terms = {"offload": run.held.disk * run.local_world}
    if isinstance(run.recipe.model, FolderModel):
        terms["4-bit weights"] = (PACKED_BYTES + SCALE_BYTES) * run.parts.whole.packed
    return terms


def _traffic(run: _Run) -> tuple[float, float]:
    """Bytes that offload reads from a node's first tier in a step, and writes to it.

    Masters, states and summed gradients once each way. Parameters are read in the forward and in the backward pass of every
    micro-batch, and written once (ZeRO-Infinity, Rajbhandari et al. 2021, section 4).
    """
    zero, counts = run.recipe.parallel, run.parts.whole
    if run.layout.engine != "zero" or not isinstance(zero, Zero):
        return 0, 0
    read = written = 0.0
    if zero.offload_optimizer == "nvme":
        read = written = (states(run.recipe, counts) + run.exact * counts.trained) * run.share
    if zero.offload_parameters == "nvme":
        read += _whole(run, counts) * run.share * 2 * run.layout.accumulation
        written += run.compute * counts.trained * run.share
    return read, written
