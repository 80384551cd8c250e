"""Keys of DeepSpeed's own configuration that follow from the recipe, each with what to set in their place, and those that a
recipe may give. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_BATCH = "batch.rows and batch.micro_rows; the ranks' shares follow"
_TIER = "the first tier of the site, tiers[0].path of site.yaml"
_SUM = "nothing: gradients are summed in float32, as the loss is divided by the weight of the global batch"
_STATES = "nothing: checkpoints find each parameter's part by how DeepSpeed cuts without it"
_AS_THEY_ARE = "nothing: weights and gradients travel as they are, as another engine goes on from what comes out"
_SAVED = "checkpoint; this toolkit writes and reads them, not DeepSpeed"

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
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.offload_parameters",
    "zero_optimization.offload_param.nvme_path": _TIER,
    "zero_optimization.zenflow": _STATES,
    "zero_optimization.zero_hpz_partition_size": _STATES,
    "zero_optimization.round_robin_gradients": _STATES,
    "zero_optimization.parameter_alignment": _STATES,
    "zero_optimization.legacy_stage1": "parallel.stage",
    "zero_optimization.zero_quantized_weights": _AS_THEY_ARE,
    "zero_optimization.zero_quantized_nontrainable_weights": _AS_THEY_ARE,
    "zero_optimization.zero_quantized_gradients": _AS_THEY_ARE,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.leaf_module": "nothing: which modules are gathered as one follows from the model",
    "zero_optimization.elastic_checkpoint": _SAVED,
    "zero_optimization.load_from_fp32_weights": _SAVED,
    "zero_optimization.pipeline_loading_checkpoint": _SAVED,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _SAVED,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _SAVED,
}
"""Key paths that a recipe may not give under ``parallel.deepspeed``. A path stands for all that lies below it."""

_SWITCH, _COUNT, _SECTION = "true or false", "a whole number; leave it out for the one that plan shows", "keys and values"
_AT_LEAST_1, _DEPTH, _FACTOR = (
    "a whole number of at least 1",
    "a whole number of at least 1, or -1 for all",
    "a number of at least 0",
)
_LEVEL, _NAMES, _FILE = "debug, info, warning, error or critical", "a list of names", "the path of a file"

KEYS: Mapping[str, str] = {
    "zero_optimization": _SECTION,
    "zero_optimization.contiguous_gradients": _SWITCH,
    "zero_optimization.reduce_scatter": _SWITCH,
    "zero_optimization.reduce_bucket_size": _COUNT,
    "zero_optimization.use_multi_rank_bucket_allreduce": _SWITCH,
    "zero_optimization.allgather_partitions": _SWITCH,
    "zero_optimization.allgather_bucket_size": _COUNT,
    "zero_optimization.overlap_comm": _SWITCH,
    "zero_optimization.sub_group_size": _COUNT,
    "zero_optimization.stage3_prefetch_bucket_size": _COUNT,
    "zero_optimization.stage3_param_persistence_threshold": _COUNT,
    "zero_optimization.stage3_model_persistence_threshold": _COUNT,
    "zero_optimization.stage3_max_live_parameters": _COUNT,
    "zero_optimization.stage3_max_reuse_distance": _COUNT,
    "zero_optimization.stage3_module_granularity_threshold": _COUNT,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _SWITCH,
    "zero_optimization.stage3_allgather_sequential": _SWITCH,
    "zero_optimization.ignore_unused_parameters": _SWITCH,
    "zero_optimization.memory_efficient_linear": _SWITCH,
    "zero_optimization.override_module_apply": _SWITCH,
    "zero_optimization.log_trace_cache_warnings": _SWITCH,
    "zero_optimization.enable_sanity_checks": _SWITCH,
    "zero_optimization.offload_optimizer": _SECTION,
    "zero_optimization.offload_optimizer.buffer_count": _COUNT,
    "zero_optimization.offload_optimizer.pin_memory": _SWITCH,
    "zero_optimization.offload_optimizer.fast_init": _SWITCH,
    "zero_optimization.offload_param": _SECTION,
    "zero_optimization.offload_param.buffer_count": _COUNT,
    "zero_optimization.offload_param.buffer_size": _COUNT,
    "zero_optimization.offload_param.max_in_cpu": _COUNT,
    "zero_optimization.offload_param.pin_memory": _SWITCH,
    "aio": _SECTION,
    "aio.block_size": _AT_LEAST_1,
    "aio.queue_depth": _AT_LEAST_1,
    "aio.intra_op_parallelism": _AT_LEAST_1,
    "aio.single_submit": _SWITCH,
    "aio.overlap_events": _SWITCH,
    "aio.use_gds": _SWITCH,
    "comms_logger": _SECTION,
    "comms_logger.enabled": _SWITCH,
    "comms_logger.prof_all": _SWITCH,
    "comms_logger.prof_ops": _NAMES,
    "comms_logger.verbose": _SWITCH,
    "comms_logger.debug": _SWITCH,
    "disable_allgather": _SWITCH,
    "disable_python_gc": _SWITCH,
    "dump_state": _SWITCH,
    "flops_profiler": _SECTION,
    "flops_profiler.enabled": _SWITCH,
    "flops_profiler.recompute_fwd_factor": _FACTOR,
    "flops_profiler.profile_step": _AT_LEAST_1,
    "flops_profiler.module_depth": _DEPTH,
    "flops_profiler.top_modules": _AT_LEAST_1,
    "flops_profiler.detailed": _SWITCH,
    "flops_profiler.output_file": _FILE,
    "log_level": _LEVEL,
    "memory_breakdown": _SWITCH,
    "steps_per_print": _AT_LEAST_1,
    "timers": _SECTION,
    "timers.throughput": _SECTION,
    "timers.throughput.enabled": _SWITCH,
    "timers.throughput.synchronized": _SWITCH,
    "wall_clock_breakdown": _SWITCH,
    "zero_allow_untested_optimizer": _SWITCH,
}
"""Key paths that a recipe may give, as they change nothing that is learned, each with what it may be. DeepSpeed passes over a
key that it does not know, and stumbles on a value of another kind once it trains."""

FREE = tuple(key for key in KEYS if "." not in key)
"""Those of them that are no part of another."""


def faults(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with ``given``: keys that are neither ``FREE`` nor decided, and values of another kind than DeepSpeed's."""
    heads = {path.partition(".")[0] for path in DECIDED}
    for key in given:
        if key not in FREE and key not in heads:
            yield _unknown(key, FREE)
    for path, allowed in KEYS.items():
        for value in _at(given, path):
            if not _KINDS[allowed](value):
                yield f"{path} is {value!r}; allowed: {allowed}"
            elif allowed == _SECTION:
                yield from _unknown_in(path, value)


def _unknown_in(section: str, given: Mapping[str, Any]) -> Iterator[str]:
    """The keys in a section that DeepSpeed does not have there."""
    below = f"{section}."
    names = [path.removeprefix(below) for path in KEYS if path.startswith(below) and "." not in path.removeprefix(below)]
    for key in given:
        if key not in names and f"{below}{key}" not in DECIDED:
            yield f"{below}{_unknown(key, names)}"


def _unknown(key: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key), allowed, n=1)  # in YAML a key may be a number
    return f"{key}: " + (f"did you mean {near[0]}?" if near else "cannot be set here") + f" Allowed: {', '.join(allowed)}"


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    _SECTION: lambda value: isinstance(value, Mapping),
    _SWITCH: lambda value: isinstance(value, bool),
    _COUNT: _is_count,
    _AT_LEAST_1: lambda value: _is_whole(value) and value >= 1,
    _DEPTH: lambda value: _is_whole(value) and (value >= 1 or value == -1),
    _FACTOR: lambda value: _is_number(value) and value >= 0,
    _LEVEL: lambda value: value in ("debug", "info", "warning", "error", "critical"),
    _NAMES: lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value),
    _FILE: lambda value: isinstance(value, str) and value != "",
}
"""Whether a value is of each kind."""


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
