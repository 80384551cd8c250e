"""Keys of DeepSpeed's own configuration that follow from the recipe, each with what to set in their place, and those that a
recipe may give. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

_BATCH = "batch.rows and batch.micro_rows; the ranks' shares follow"
_TIER = "the first tier of the site, tiers[0].path of site.yaml"
_SUM = "nothing: gradients are summed in float32, as the loss is divided by the weight of the global batch"
_STATES = "nothing: checkpoints find each parameter's part by how DeepSpeed cuts without it"

DECIDED: Mapping[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
    "checkpoint": "checkpoint",
    "data_efficiency": "data",
    "curriculum_learning": "data",
    "tensorboard": "monitoring",
    "wandb": "monitoring",
    "csv_monitor": "monitoring",
    "comet": "monitoring",
    "communication_data_type": _SUM,
    "gradient_allreduce_op": _SUM,
    "prescale_gradients": _SUM,
    "gradient_predivide_factor": _SUM,
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization.stage": "parallel.stage",
    "zero_optimization.compute_grad_norm": "nothing: the norm of every step is watched",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_param": "parallel.offload_parameters",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": _TIER,
    "zero_optimization.offload_optimizer.ratio": "parallel.offload_optimizer, all of it or none",
    "zero_optimization.offload_optimizer.super_offload": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.pipeline_read": _STATES,
    "zero_optimization.offload_optimizer.pipeline_write": _STATES,
    "zero_optimization.offload_param.device": "parallel.offload_parameters",
    "zero_optimization.offload_param.nvme_path": _TIER,
    "zero_optimization.zenflow": _STATES,
    "zero_optimization.zero_hpz_partition_size": _STATES,
}
"""Key paths that a recipe may not give under ``parallel.deepspeed``. A path stands for all that lies below it."""

FREE = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
)
"""Keys that a recipe may give, as they change nothing that is learned. DeepSpeed passes over a key that it does not know."""

_SECTIONS = ("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_COUNTS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.offload_param.buffer_count",
    "zero_optimization.offload_param.buffer_size",
)
"""What the forecast of memory counts with."""


def faults(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with ``given``: keys that are neither ``FREE`` nor decided, and values of another kind than DeepSpeed's."""
    heads = {path.partition(".")[0] for path in DECIDED}
    for key in given:
        if key not in FREE and key not in heads:
            near = difflib.get_close_matches(key, FREE, n=1)
            yield f"{key}: " + (f"did you mean {near[0]}?" if near else "cannot be set here") + f" Allowed: {', '.join(FREE)}"
    for path in _SECTIONS:
        for value in _at(given, path):
            if not isinstance(value, Mapping):
                yield f"{path} is {value!r}; allowed: keys and values"
    for path in _COUNTS:
        for value in _at(given, path):
            if not _is_count(value):
                yield f"{path} is {value!r}; allowed: a whole number; leave it out for the one that plan shows"


def _is_count(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0 and value == int(value)


def _at(given: Mapping[str, Any], path: str) -> tuple[Any, ...]:
    """The value at a path of keys; none where it was not given."""
    value: Any = given
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return ()
        value = value[key]
    return (value,)


def decided_keys(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key path in ``given`` that the recipe decides already, and what to set in its place."""
    for path in _paths(given):
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            head = ".".join(parts[:length])
            if head in DECIDED:
                yield path, DECIDED[head]
                break


def _paths(given: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in given.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
