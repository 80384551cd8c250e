"""Every metric of outgrow, declared once: name, kind, labels and what it means. Dashboards and rules name no other.

Base units (seconds, bytes, watts, celsius, ratios from 0 to 1), ``_total`` for counters, and labels of few values alone. The
agent adds no constant: a series whose source has said nothing yet is not exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

RUN = ("run", "node")
RANK = ("run", "node", "rank")
GPU = ("node", "gpu")
NODE = ("node",)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. ``name`` of a counter ends in ``_total``; a histogram gives ``_bucket``, ``_sum`` and ``_count``."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


def _counter(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name=f"outgrow_{name}_total", kind="counter", labels=labels, help=text)


def _gauge(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name=f"outgrow_{name}", kind="gauge", labels=labels, help=text)


# --- a run, told by the node of its rank 0 ----------------------------------------------------------------------------

RUN_INFO = _gauge(
    "run_info",
    (*RUN, "name", "engine", "device", "precision", "world", "version"),
    "1; what the run is, in its labels.",
)
RUN_STATE = _gauge(
    "run_state",
    (*RUN, "state"),
    "1 for the state that the run is in (starting, running, stalled, lost, restarting, finished, failed, interrupted), 0 for "
    "every other.",
)
RUN_ACTIVE = _gauge("run_active", RUN, "1 while the run should be making steps: also when its ranks are gone without a word.")
RUN_START_TIME = _gauge("run_start_time_seconds", RUN, "Unix time of the first start of the run.")
RUN_ATTEMPT_START_TIME = _gauge("run_attempt_start_time_seconds", RUN, "Unix time of the newest start of the run.")
RUN_STEP = _gauge("run_step", RUN, "Finished optimizer steps of the run.")
RUN_PLANNED_STEPS = _gauge("run_planned_steps", RUN, "Optimizer steps that the run is to make.")
RUN_EPOCH = _gauge("run_epoch", RUN, "Pass over the dataset, from 0.")
RUN_LAST_STEP_TIME = _gauge("run_last_step_timestamp_seconds", RUN, "Unix time of the last finished step.")
RUN_STALL_AFTER = _gauge("run_stall_after_seconds", RUN, "Seconds without a finished step after which the run is stalled.")
RUN_STEPS = _counter("run_steps", RUN, "Optimizer steps computed, those computed again after a restart included.")
RUN_TOKENS = _counter(
    "run_tokens", (*RUN, "kind"), "Positions computed: valid tokens and padding, those computed again included."
)
RUN_SAMPLES = _counter("run_samples", RUN, "Rows computed, those computed again included.")
RUN_LOSS = _gauge("run_loss", RUN, "Training loss of the last logged step, nats a weighted token over the global batch.")
RUN_VALIDATION_LOSS = _gauge("run_validation_loss", RUN, "Loss on the held-out rows at the last validation, nats a token.")
RUN_GRADIENT_NORM = _gauge("run_gradient_norm", RUN, "2-norm of the global gradient before clipping, last logged step.")
RUN_LEARNING_RATE = _gauge("run_learning_rate", RUN, "Learning rate of the last logged step.")
RUN_STEP_SECONDS = Metric(
    name="outgrow_run_step_seconds", kind="histogram", labels=RUN, help="Seconds an optimizer step, waiting for data included."
)
RUN_STEP_MEDIAN = _gauge("run_step_median_seconds", RUN, "Median of the last 64 steps, seconds.")
RUN_TOKENS_PER_SECOND = _gauge("run_tokens_per_second", RUN, "Valid tokens a second between the last two logged steps.")
RUN_MODEL_FLOPS = _counter(
    "run_model_flops",
    RUN,
    "Floating-point operations of the model, forward and backward, recomputed activations not counted (Chowdhery et al. 2022).",
)
RUN_MFU = _gauge(
    "run_mfu_ratio",
    (*RUN, "ceiling"),
    "Model FLOPs a second over what the devices could do, as their vendor says or as a matrix product at the start measured.",
)
RUN_NONFINITE = _counter("run_nonfinite_steps", RUN, "Steps whose loss or gradient was not finite.")
RUN_RESTARTS = _counter("run_restarts", (*RUN, "cause"), "Starts after the first, by what made them necessary.")
RUN_WALL_SECONDS = _counter(
    "run_wall_seconds",
    (*RUN, "kind"),
    "Seconds since the first start, each counted once: productive, init, checkpoint, restore, recompute, stalled, idle.",
)
RUN_CHECKPOINT_SECONDS = _counter("run_checkpoint_seconds", (*RUN, "stage"), "Seconds that checkpoints took, by stage.")
RUN_CHECKPOINT_BYTES = _counter("run_checkpoint_bytes", RUN, "Bytes of committed checkpoints.")
RUN_CHECKPOINTS = _counter("run_checkpoints", (*RUN, "result"), "Checkpoints committed and failed.")
RUN_CHECKPOINT_TIME = _gauge("run_checkpoint_last_success_timestamp_seconds", RUN, "Unix time of the last commit.")
RUN_CHECKPOINT_INTERVAL = _gauge(
    "run_checkpoint_interval_seconds", RUN, "Seconds between checkpoints, as many median steps as the recipe says."
)
RUN_REMAINING_SECONDS = _gauge("run_remaining_seconds", RUN, "Seconds to the last step at the median of the last steps.")
RUN_REMAINING_DOLLARS = _gauge("run_remaining_dollars", RUN, "What these cost at the site's price of a GPU hour.")
RUN_EVENTS_DROPPED = _counter("run_events_dropped", RUN, "Records that events.jsonl could not take.")

# --- a rank -----------------------------------------------------------------------------------------------------------

RANK_UP = _gauge("rank_up", RANK, "1 while the rank's process is there, 0 when it is gone without having said so.")
RANK_STEP = _gauge("rank_step", RANK, "Finished optimizer steps.")
RANK_LAST_PROGRESS_TIME = _gauge("rank_last_progress_timestamp_seconds", RANK, "Unix time of the rank's last sign of life.")
RANK_LOSS = _gauge("rank_loss", RANK, "Training loss of the rank's own rows at the last logged step, nats a weighted token.")
RANK_PHASE_SECONDS = _counter("rank_phase_seconds", (*RANK, "phase"), "Seconds of the training loop, by what they went to.")
RANK_MEMORY = _gauge(
    "rank_memory_bytes",
    (*RANK, "kind"),
    "Memory: allocated, reserved and peak of the device's allocator; anon, file and shmem of the process in RAM.",
)
RANK_ALLOCATION_RETRIES = _counter(
    "rank_allocation_retries", RANK, "Times that the device's allocator had to free its cache to serve a request."
)
RANK_CPU_SECONDS = _counter("rank_cpu_seconds", RANK, "Processor seconds of the rank's process in this start of the run.")
RANK_LOADER_READY = _gauge("rank_loader_ready_steps", RANK, "Steps that loader workers hold ready.")

# --- tiers ------------------------------------------------------------------------------------------------------------

TIER_SIZE = _gauge("tier_size_bytes", ("node", "tier"), "Bytes of the disk that a tier lies on.")
TIER_FREE = _gauge("tier_free_bytes", ("node", "tier"), "Bytes free on it.")
TIER_SHARDS = _counter("tier_shards", (*RUN, "tier"), "Shards read whole from a tier.")
TIER_BYTES = _counter("tier_bytes", (*RUN, "tier"), "Bytes read from a tier.")
TIER_READ_SECONDS = _counter("tier_read_seconds", (*RUN, "tier"), "Seconds that reading took.")
TIER_ERRORS = _counter("tier_errors", (*RUN, "tier", "kind"), "Failed reads of a tier, by kind.")
CACHE_HITS = _counter("cache_hits", RUN, "Visits of a shard that lay on the first tier already.")
CACHE_MISSES = _counter("cache_misses", RUN, "Visits of a shard that did not.")
CACHE_FETCHES = _counter("cache_fetches", RUN, "Shards copied to the first tier.")
CACHE_REFETCHES = _counter("cache_refetches", RUN, "Those of them that had been there before.")
CACHE_EVICTIONS = _counter("cache_evictions", RUN, "Shards deleted from the first tier to make room.")
CACHE_HEALED = _counter("cache_healed", RUN, "Copies found damaged and fetched again.")
CACHE_READ_THROUGH = _counter("cache_read_through", RUN, "Shards read without a place on the first tier.")
CACHE_BYTES = _gauge("cache_bytes", RUN, "Bytes of shards on the first tier.")
CACHE_ROOM = _gauge("cache_room_bytes", RUN, "Bytes that they may take.")
CACHE_QUEUE = _gauge("cache_queue_shards", RUN, "Fetches that are due or running.")
CACHE_WAIT_SECONDS = _counter("cache_wait_seconds", RUN, "Seconds that readers have waited for a shard.")

# --- a node and its GPUs ----------------------------------------------------------------------------------------------

NODE_MEMORY = _gauge("node_memory_bytes", ("node", "kind"), "RAM: total and available.")
NODE_CPU_SECONDS = _counter("node_cpu_seconds", ("node", "mode"), "Processor seconds of all cores: busy, iowait, idle.")
NODE_NETWORK_BYTES = _counter(
    "node_network_bytes", ("node", "direction"), "Bytes received and sent on all interfaces but loopback."
)
GPU_INFO = _gauge("gpu_info", (*GPU, "uuid", "name"), "1; which device it is.")
GPU_UTILISATION = _gauge("gpu_utilisation_ratio", GPU, "Share of time in which a kernel ran.")
GPU_MEMORY = _gauge("gpu_memory_bytes", (*GPU, "kind"), "Device memory: total and used.")
GPU_POWER = _gauge("gpu_power_watts", GPU, "Power drawn.")
GPU_POWER_LIMIT = _gauge("gpu_power_limit_watts", GPU, "Power that it may draw.")
GPU_TEMPERATURE = _gauge("gpu_temperature_celsius", GPU, "Temperature of the chip.")
GPU_CLOCK = _gauge("gpu_clock_hertz", GPU, "Clock of the streaming multiprocessors.")
GPU_THROTTLED = _gauge(
    "gpu_throttled",
    (*GPU, "reason"),
    "1 where the clock is held down for this reason (power, thermal, hardware, brake, sync), 0 where it is not.",
)
GPU_PCIE = _gauge("gpu_pcie_bytes_per_second", (*GPU, "direction"), "PCIe traffic over the last 20 ms.")
GPU_XID = _counter("gpu_xid_errors", (*GPU, "xid"), "Errors that the driver has reported since the agent started, by XID.")

# --- the agent --------------------------------------------------------------------------------------------------------

AGENT_START_TIME = _gauge("agent_start_time_seconds", NODE, "Unix time at which the node agent started.")
AGENT_SCRAPE_SECONDS = _gauge("agent_scrape_seconds", NODE, "Seconds that gathering the last answer took.")
AGENT_ERRORS = _counter("agent_errors", ("node", "part"), "Sources that could not be read, by part.")
AGENT_RUNS = _gauge("agent_runs", NODE, "Runs that the agent knows on this node.")

METRICS: dict[str, Metric] = {value.name: value for value in list(globals().values()) if isinstance(value, Metric)}
"""By name."""

RUN_STATES = ("starting", "running", "stalled", "lost", "restarting", "finished", "failed", "interrupted")
"""Values of the label ``state``. ``stalled`` and ``lost`` are what the agent sees; the others are what rank 0 said last."""
ACTIVE_STATES = ("starting", "running", "stalled", "lost", "restarting")


def series_names(metric: Metric) -> tuple[str, ...]:
    """The names under which Prometheus knows the samples of ``metric``."""
    if metric.kind == "histogram":
        return tuple(f"{metric.name}{suffix}" for suffix in ("_bucket", "_sum", "_count"))
    return (metric.name,)
