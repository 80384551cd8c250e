"""The forecast of memory against a tracked step of the real FSDP2 engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [{"activation_checkpointing": {"kind": "full"}}, {"activation_checkpointing": {"kind": "full"}, "precision": "fp32"}, {}],
    ids=["bf16", "fp32", "keeps activations"],
)
def test_8b_on_8_ranks_takes_what_was_forecast(changes: dict[str, Any]) -> None:
    sys.path.append(str(TESTS / "unit"))
    from test_memory import foreseen, recipe, tensors

    command = [sys.executable, str(TESTS / "tracked_memory.py"), "8B of Llama 3", "8", json.dumps(changes)]
    tracked = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    forecast = tensors(foreseen("8B of Llama 3", recipe(rows=8, parallel={"kind": "fsdp2"}, **changes), 8))
    assert tracked <= forecast <= 1.15 * tracked
