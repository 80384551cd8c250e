"""Runs as the node agent sees them, made without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outgrow.monitoring.agent.scan import RunView
from outgrow.monitoring.recording.attempt import AttemptFacts

_FACTS: dict[str, Any] = {
    "run": "run",
    "name": "run",
    "folder": "runs/run",
    "fingerprint": "0" * 64,
    "storage": "/storage",
    "attempt": "a",
    "started": 1.0,
    "host": "n",
    "world": 1,
    "local_ranks": (0,),
    "steps": 10,
    "rows": 4,
    "sequence_length": 32,
    "checkpoint_every_steps": 5,
    "engine": "plain",
    "device": "cpu",
    "device_name": "cpu",
    "precision": "float32",
    "parameters": 100,
    "flops_per_token": 600.0,
    "vendor_flops": None,
    "gpu_hour_usd": None,
    "stall_after_s": 60.0,
    "shard_counts": "",
    "tiers": {},
    "gpus": {},
    "versions": {},
}


def attempt_facts(**values: Any) -> AttemptFacts:
    return AttemptFacts(**{**_FACTS, **values})


def run_view(**facts: Any) -> RunView:
    """A run without a word of its ranks."""
    return RunView(folder=Path("/absent"), facts=attempt_facts(**facts), ranks={}, state="running")
