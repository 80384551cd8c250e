"""What a rank holds from step to step, by engine: on its device, in the node's memory, on the node's first tier."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from math import ceil, inf, prod

from outgrow.contracts import Layout, ModelFacts
from outgrow.recipes.deepspeed import deepspeed_config
from outgrow.recipes.memory.activations import COMPUTE_BYTES, MASTER_BYTES
from outgrow.recipes.memory.counts import Counts, Parts, Sort, optimizer_bytes, states, tensors
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Fsdp2, Zero

PACKED_BYTES = 0.5
"""Of a weight in NF4: 4 bits."""
SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Of a weight's share of its scales: one of 8 bits for 64 weights, and one in float32 for 256 of those (Dettmers et al. 2023,
section 3, double quantisation)."""
_SUB_GROUP = 10**9
"""Numbers of a rank that DeepSpeed's stage 3 steps at a time where its configuration does not say."""


@dataclass(frozen=True)
class Held:
    """Bytes a rank holds from step to step: on its device (``gradients`` by the end of a step alone); in the node's memory, by
    what they are for; and on the node's first tier."""

    weights: float
    optimizer: float
    gradients: float
    host: Mapping[str, float]
    disk: float


def held(recipe: Recipe, facts: ModelFacts, parts: Parts, layout: Layout, device: str) -> Held:
    """What each rank of ``layout`` holds, counted as ZeRO does (Rajbhandari et al. 2020, section 3): of a trained parameter 12
    bytes of float32 master and AdamW's moments, 4 of gradients and, in bf16, 2 of the copy that computes; of a frozen one the
    copy alone, or half a byte in NF4. Memory that is pinned for a GPU counts as ``_pinned`` says."""
    compute, exact = COMPUTE_BYTES[recipe.precision], MASTER_BYTES[recipe.precision]
    counts = parts.whole
    frozen = compute * counts.frozen
    scales = SCALE_BYTES * counts.packed
    packed = PACKED_BYTES * counts.packed
    optimizer, masters = optimizer_bytes(recipe, counts), exact * counts.trained
    if layout.engine == "zero":
        return _held_by_zero(recipe, facts, counts, layout, device)
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
        # FSDP2 pins each parameter's shard by itself, and each gradient's.
        own, pins = _shards(recipe, facts, shard), device == "cuda"
        summed = _lying((exact * number for number in own.matrices + own.vectors), pins=pins)
        others = [*(compute * number for number in own.frozen), *(PACKED_BYTES * number for number in own.packed)]
        host = {"weights": summed + _lying(others, pins=pins), "optimizer": optimizer / shard, "gradients": summed}
        return Held(scales, 0, gradients - masters / shard, host, 0)
    return Held((masters + frozen + packed) / shard + scales, optimizer / shard, gradients, {}, 0)


@dataclass(frozen=True)
class _Shards:
    """How many numbers a rank has of each parameter: of trained matrices and vectors, of frozen and of packed ones."""

    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    frozen: tuple[int, ...]
    packed: tuple[int, ...]


def _shards(recipe: Recipe, facts: ModelFacts, ranks: int) -> _Shards:
    made = list(tensors(recipe, facts, facts.shapes))

    def of(sort: Sort, dims: Container[int]) -> tuple[int, ...]:
        return tuple(ceil(prod(shape) / ranks) for own, shape in made if own == sort and len(shape) in dims)

    every = range(10)
    return _Shards(of("trained", every[2:]), of("trained", every[:2]), of("frozen", every), of("packed", every))


def _lying(sizes: Iterable[float], *, pins: bool) -> float:
    """Bytes of memory that blocks of so many bytes take."""
    return sum(_pinned(size) if pins else size for size in sizes)


def _pinned(size: float) -> int:
    """Bytes that a block of pinned memory takes: torch's allocator of it rounds each up to a power of two."""
    return 1 << (ceil(size) - 1).bit_length() if size else 0


def _held_by_zero(recipe: Recipe, facts: ModelFacts, counts: Counts, layout: Layout, device: str) -> Held:
    """DeepSpeed's shares: stage 1 shards masters and states, 2 gradients too, 3 the copy that computes and 4-bit weights too.
    The scales of those are whole on every rank's device.

    With states offloaded to memory the sums of gradients lie there twice, as they came and as the optimizer takes them; with
    states on disk once, and the other there. What lies in memory is pinned: in stage 3 all sums in one block, as the optimizer
    takes them in one a sub-group, and offloaded parameters first each by itself and then in one block, while the allocator
    keeps those; in stages 1 and 2 masters, gradients and a copy that computes, in one block a group.
    """
    zero = recipe.parallel
    assert isinstance(zero, Zero)
    compute, exact = COMPUTE_BYTES[recipe.precision], MASTER_BYTES[recipe.precision]
    section = deepspeed_config(layout, recipe, "", facts.largest_tensor)["zero_optimization"]
    states_there, parameters_there = section.get("offload_optimizer", {}), section.get("offload_param", {})
    pins, pins_parameters = (device == "cuda" and bool(there.get("pin_memory")) for there in (states_there, parameters_there))
    kept = states(recipe, counts) / layout.world
    summed = exact * counts.trained / layout.world
    weights = compute * (counts.trained + counts.frozen) + PACKED_BYTES * counts.packed
    weights /= layout.world if zero.stage == 3 else 1
    scales = SCALE_BYTES * counts.packed
    optimizer, gradients = kept, exact * counts.trained if zero.stage == 1 else summed
    own = _shards(recipe, facts, layout.world)
    groups = _sub_groups(own, section.get("sub_group_size", _SUB_GROUP) if zero.stage == 3 else inf)
    taken = _lying((exact * group for group in groups), pins=pins)
    host: dict[str, float] = {}
    disk = 0.0
    if zero.offload_optimizer == "cpu" and zero.stage == 3:
        host = {"optimizer": kept, "gradients": _lying([summed], pins=pins) + taken}
    elif zero.offload_optimizer == "cpu":
        copies = _lying((compute * group for group in groups), pins=pins)
        host = {"optimizer": kept - summed + taken, "gradients": summed + taken, "weights": copies}
    elif zero.offload_optimizer == "nvme":
        buffers = exact * states_there["buffer_count"] * max(groups, default=0)
        host = {"gradients": _lying([summed], pins=pins), "buffers": buffers}
        disk = kept + summed
    if zero.offload_optimizer != "none":
        optimizer, gradients = 0, 0
    if zero.offload_parameters == "cpu":
        plain = [compute * number for number in (*own.matrices, *own.vectors, *own.frozen)]
        each = _lying([*plain, *(PACKED_BYTES * number for number in own.packed)], pins=pins_parameters)
        host["weights"] = each + (_pinned(compute * sum(groups)) if pins_parameters else 0)
        weights = 0
    elif zero.offload_parameters == "nvme":
        stay = compute * min(parameters_there["max_in_cpu"], sum(groups))
        host["weights"] = _lying([stay], pins=pins_parameters)
        host["buffers"] += compute * parameters_there["buffer_count"] * parameters_there["buffer_size"]
        disk, weights = disk + weights, 0
    return Held(weights + scales, optimizer, gradients, host, disk)


def _sub_groups(own: _Shards, most: float) -> list[int]:
    """Numbers of a rank in each sub-group that DeepSpeed steps at a time: parameters in their order until there are ``most``;
    matrices and vectors apart, as their weights decay and do not."""
    groups: list[int] = []
    for shards in (own.matrices, own.vectors):
        gathered = 0
        for number in shards:
            gathered += number
            if gathered >= most:
                groups.append(gathered)
                gathered = 0
        groups += [gathered] if gathered else []
    return groups


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
