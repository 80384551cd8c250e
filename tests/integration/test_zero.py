"""DeepSpeed's ZeRO trains as the engine without wrapping does, in the node's memory and on its disk too.

The limit is float32's: DeepSpeed keeps its own state in that. What every engine and method come to is in test_parity.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from doctor import need
from engine_cases import Case, Outcome, born_weights, on_ranks, train
from safetensors.torch import save_file
from tiny_runs import Place, tiny_place

from outgrow.recipes.combinations import METHODS

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
"""Measured over 20 steps: fp32 1e-6 in losses of 4.1 to 4.6 and 2e-7 in norms of 1."""


def zero(stage: int, shard: int, *, micro_rows: int = 8, **more: Any) -> Case:
    parallel = {"kind": "zero", "stage": stage}
    parallel |= {key: more.pop(key) for key in ("offload_optimizer", "offload_parameters") if key in more}
    return Case(
        engine="zero", shard=shard, micro_rows=micro_rows, settings={"parallel": parallel}, **{"precision": "fp32", **more}
    )


WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4099, "head_dim": 64}
LARGE = {"hidden_size": 1024, "intermediate_size": 5120, "head_dim": 64}
OFFLOADED = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
FEW = {
    "stage 1 on 2, rows in parts": zero(1, 2, micro_rows=2),
    "stage 2 on 2": zero(2, 2),
    "stage 3 on 2, CPU offload, rows in parts": zero(3, 2, micro_rows=2, **OFFLOADED),
    "stage 3 on 2, bf16": zero(3, 2, precision="bf16"),
}
MANY = {
    f"stage {stage} on {world}{', CPU offload' if more else ''}": zero(stage, world, micro_rows=micro_rows, **more)
    for stage in (1, 2, 3)
    for world, micro_rows in ((1, 3), (2, 3), (4, 1))
    for more in ({}, {"offload_optimizer": "cpu"})
} | {f"stage {stage} on 2, bf16": zero(stage, 2, precision="bf16", micro_rows=1) for stage in (1, 2)}


@cache
def plain(precision: str) -> Outcome:
    return train(Case(precision=precision))


def require_parity(cases: dict[str, Case], found: dict[str, Outcome]) -> None:
    for name, outcome in found.items():
        precision = cases[name].precision
        expected, tolerance = plain(precision), TOLERANCE[precision]
        assert outcome.losses == pytest.approx(expected.losses, rel=0, abs=tolerance), name
        assert outcome.norms == pytest.approx(expected.norms, rel=0, abs=tolerance), name
        assert outcome.validation == pytest.approx(expected.validation, rel=0, abs=tolerance), name
        assert outcome.born == expected.born, name


def test_zero_trains_as_plain(tmp_path: Path) -> None:
    require_parity(FEW, on_ranks(FEW, tmp_path))


@pytest.mark.parity
@pytest.mark.timeout(1800)
def test_every_stage_and_world_trains_as_plain(tmp_path: Path) -> None:
    require_parity(MANY, on_ranks(MANY, tmp_path))


@pytest.mark.parity
@pytest.mark.timeout(1200)  # where the extension was never compiled, it is now
def test_offload_to_a_disk_trains_as_plain(tmp_path: Path) -> None:
    """At a size that DeepSpeed does swap: it leaves in memory what is under 1 MiB a rank."""
    need("g++", "ninja", "libaio.h")
    disk = tmp_path / "tier/offload"
    offloaded = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme": str(disk), "sizes": WIDE}
    cases = {f"stage 3 on {world}": zero(3, world, **offloaded) for world in (1, 2)}
    found = on_ranks(cases, tmp_path)
    # Of float64: PyTorch sums the squares of a million float32 numbers on a CPU with an error of 5e-5, DeepSpeed in float64.
    expected = train(Case(precision="fp64", sizes=WIDE))
    for name, outcome in found.items():
        assert outcome.losses == pytest.approx(expected.losses, rel=0, abs=TOLERANCE["fp32"]), name
        assert outcome.norms == pytest.approx(expected.norms, rel=0, abs=TOLERANCE["fp32"]), name
    assert not list(disk.iterdir()), "the ranks have ended, and nothing of theirs is left"


@pytest.mark.parity
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["full", "LoRA", "QLoRA"])
def test_more_matrices_than_buffers_train_from_a_disk_as_from_memory(tmp_path: Path, method: str) -> None:
    """Each of a size that DeepSpeed does swap: at least 1 MiB of it a rank, in 4 bits too; frozen ones and trained ones."""
    need("g++", "ninja", "libaio.h")
    adapter = METHODS[method] | {"rank": 4} if method != "full" else {}
    same: dict[str, Any] = {"adapter": adapter, "sizes": LARGE}
    if method == "QLoRA":
        weights = {name: values.contiguous() for name, values in born_weights(Case(sizes=LARGE)).items()}
        save_file(weights, tmp_path / "model.safetensors")
        same["base"] = str(tmp_path)
    disk = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme": str(tmp_path / "tier/offload")}
    found = on_ranks({"memory": zero(3, 2, **same), "disk": zero(3, 2, **disk, **same)}, tmp_path)
    assert found["disk"].losses == pytest.approx(found["memory"].losses, rel=0, abs=1e-6)
    assert found["disk"].norms == pytest.approx(found["memory"].norms, rel=1e-5, abs=0)


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_a_run_on_ray_goes_on_in_another_engine(tmp_path: Path) -> None:
    """ZeRO-3 with CPU offload inside Ray Train, then FSDP2 from its checkpoint: the losses of FSDP2 all the way."""
    words = ["train", "recipe.yaml", "schedule.options.seconds=0", "checkpoint.every_steps=3"]
    offload = ["parallel.kind=zero", "parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu"]
    for folder in ("switched", "straight"):
        (tmp_path / folder).mkdir()
    with tiny_place(tmp_path / "switched") as place:
        said = place.run(*words, "duration.steps=6", *offload, timeout_s=300)
        assert "step 6/6  finished" in said
        said = place.run(*words, "duration.steps=12", timeout_s=300)
        assert "step 12/12  finished" in said
        switched = losses(place)
    with tiny_place(tmp_path / "straight") as place:
        place.run(*words, "duration.steps=12", timeout_s=300)
        straight = losses(place)
    assert sorted(switched) == list(range(1, 13))
    assert switched == pytest.approx(straight, rel=0, abs=TOLERANCE["fp32"])


def losses(place: Place) -> dict[int, float]:
    return {record.step: record.loss for record in place.records() if record.kind == "step" and record.loss is not None}
