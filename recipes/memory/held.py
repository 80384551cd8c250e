"""What a rank holds from step to step, by engine: on its device, in the node's memory, on the node's first tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outgrow.contracts import Layout
from outgrow.recipes.deepspeed import NVME_SUB_GROUP, deepspeed_config
from outgrow.recipes.memory.activations import COMPUTE_BYTES, MASTER_BYTES
from outgrow.recipes.memory.counts import Counts, Parts, optimizer_bytes, states
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Fsdp2, Zero

PACKED_BYTES = 0.5
"""Of a weight in NF4: 4 bits."""
SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Of a weight's share of its scales: one of 8 bits for 64 weights, and one in float32 for 256 of those (Dettmers et al. 2023,
section 3, double quantisation)."""


@dataclass(frozen=True)
class Held:
    """Bytes a rank holds from step to step: on its device (``gradients`` by the end of a step alone); in the node's memory, by
    what they are for; and on the node's first tier."""

    weights: float
    optimizer: float
    gradients: float
    host: Mapping[str, float]
    disk: float


def held(recipe: Recipe, parts: Parts, layout: Layout, largest_tensor: int) -> Held:
    """What each rank of ``layout`` holds, counted as ZeRO does (Rajbhandari et al. 2020, section 3): of a trained parameter 12
    bytes of float32 master and AdamW's moments, 4 of gradients and, in bf16, 2 of the copy that computes; of a frozen one the
    copy alone, or half a byte in NF4."""
    compute, exact = COMPUTE_BYTES[recipe.precision], MASTER_BYTES[recipe.precision]
    counts = parts.whole
    frozen = compute * counts.frozen
    scales = SCALE_BYTES * counts.packed
    packed = PACKED_BYTES * counts.packed
    optimizer, masters = optimizer_bytes(recipe, counts), exact * counts.trained
    if layout.engine == "zero":
        return _held_by_zero(recipe, counts, layout, largest_tensor)
    if layout.engine in ("plain", "ddp"):
        copy = compute * counts.trained if recipe.precision == "bf16" else 0
        return Held(masters + copy + frozen + packed + scales, optimizer, masters, {}, 0)
    shard = layout.shard
    gradients = masters / shard
    if (
        isinstance(recipe.parallel, Fsdp2)
        and recipe.parallel.reduce_gradients == "last_micro_batch"
        and layout.accumulation > 1
    ):
        gradients = masters
    if isinstance(recipe.parallel, Fsdp2) and recipe.parallel.offload == "cpu":
        host = {"weights": (masters + frozen + packed) / shard, "optimizer": optimizer / shard, "gradients": masters / shard}
        return Held(scales, 0, gradients - masters / shard, host, 0)
    return Held((masters + frozen + packed) / shard + scales, optimizer / shard, gradients, {}, 0)


def _held_by_zero(recipe: Recipe, counts: Counts, layout: Layout, largest_tensor: int) -> Held:
    """DeepSpeed's shares: stage 1 shards masters and states, 2 gradients too, 3 the copy that computes too.

    With states offloaded to memory the sums of gradients lie there twice, as they came and as the optimizer takes them; with
    states on disk once, and the other there.
    """
    zero = recipe.parallel
    assert isinstance(zero, Zero)
    compute, exact = COMPUTE_BYTES[recipe.precision], MASTER_BYTES[recipe.precision]
    kept = states(recipe, counts) / layout.world
    summed = exact * counts.trained / layout.world
    weights = compute * (counts.trained + counts.frozen) / (layout.world if zero.stage == 3 else 1)
    packed = (PACKED_BYTES + SCALE_BYTES) * counts.packed
    optimizer, gradients = kept, exact * counts.trained if zero.stage == 1 else summed
    host: dict[str, float] = {}
    disk = 0.0
    if zero.offload_optimizer == "cpu":
        optimizer, gradients = 0, 0
        host = {"optimizer": kept, "gradients": 2 * summed}
    elif zero.offload_optimizer == "nvme":
        optimizer, gradients = 0, 0
        host = {"gradients": summed, "buffers": 4 * exact * min(NVME_SUB_GROUP, counts.trained / layout.world)}
        disk = kept + summed
    if zero.offload_parameters == "cpu":
        host["weights"], weights = weights, 0
    elif zero.offload_parameters == "nvme":
        section = deepspeed_config(layout, recipe, "", largest_tensor)["zero_optimization"]["offload_param"]
        host["buffers"] = host.get("buffers", 0) + compute * section["buffer_count"] * section["buffer_size"]
        disk, weights = disk + weights, 0
    return Held(weights + packed, optimizer, gradients, host, disk)


def zero_buffers(recipe: Recipe, layout: Layout, largest_tensor: int, whole: float, least: float) -> tuple[float, float]:
    """Bytes of parameters that DeepSpeed gathers at a time, and of gradients on their way to the ranks that sum them.

    ``whole`` are the bytes of all parameters that compute, ``least`` those that are needed at a time.
    """
    compute, exact = COMPUTE_BYTES[recipe.precision], MASTER_BYTES[recipe.precision]
    section = deepspeed_config(layout, recipe, "", largest_tensor)["zero_optimization"]
    passing = 2 * exact * section["reduce_bucket_size"]
    if section["stage"] < 3:
        return compute * section["allgather_bucket_size"], passing
    live = compute * (section.get("stage3_max_live_parameters", 1e9) + section.get("stage3_prefetch_bucket_size", 5e7))
    return min(whole, max(live, least)), min(whole * exact / compute, passing)
