"""Checkpoints move between engines and worlds: each continuation is the training that nobody interrupted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from doctor import need
from engine_cases import STEPS, Case, train
from engine_chain import Leg, run_chain

TOLERANCE = 1e-5
"""float32 over 20 steps; 1.4e-6 in losses of 4.1 to 4.6 was measured."""


WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4099, "head_dim": 64}
"""So wide that DeepSpeed does swap: it leaves in memory what is under 1 MiB a rank."""


def zero(stage: int, world: int, offload: str = "none", **more: Any) -> Case:
    parallel = {"kind": "zero", "stage": stage, "offload_optimizer": offload}
    if stage == 3:
        parallel["offload_parameters"] = offload
    return Case(engine="zero", shard=world, precision="fp32", settings={"parallel": parallel}, **more)


def fsdp2(world: int) -> Case:
    return Case(engine="fsdp2", shard=world, precision="fp32")


@pytest.mark.cluster
def test_engines_continue_each_other(tmp_path: Path) -> None:
    """FSDP2 on 2 ranks goes on as ZeRO-3 on 4 and back, then through the other stages to one rank without wrapping."""
    legs = [
        Leg(case=fsdp2(2), steps=4),
        Leg(case=zero(3, 4), steps=4),
        Leg(case=fsdp2(2), steps=4),
        Leg(case=zero(1, 4), steps=2),
        Leg(case=zero(3, 2, "cpu"), steps=2),
        Leg(case=zero(2, 2), steps=2),
        Leg(case=Case(precision="fp32"), steps=2),
    ]
    assert sum(leg.steps for leg in legs) == STEPS
    passed = run_chain(legs, tmp_path)
    straight = train(Case(precision="fp32"))

    assert [loss for leg in passed for loss in leg.losses] == pytest.approx(straight.losses, rel=0, abs=TOLERANCE)
    assert [norm for leg in passed for norm in leg.norms] == pytest.approx(straight.norms, rel=0, abs=TOLERANCE)
    for before, after in pairwise(passed):
        assert after.taken_up == before.left, "parameters, moments and step counters, bit by bit"


@pytest.mark.parity
@pytest.mark.timeout(1200)  # where the extension was never compiled, it is now
def test_what_lies_on_a_disk_is_saved_and_taken_up(tmp_path: Path) -> None:
    need("g++", "ninja", "libaio.h")
    disk = str(tmp_path / "tier/offload")
    legs = [
        Leg(case=zero(2, 2, sizes=WIDE), steps=2),
        Leg(case=zero(3, 2, "nvme", nvme=disk, sizes=WIDE), steps=2),
        Leg(case=zero(3, 1, "nvme", nvme=disk, sizes=WIDE), steps=2),
        Leg(case=zero(3, 1, sizes=WIDE), steps=2),
    ]
    passed = run_chain(legs, tmp_path)
    # Of float64: PyTorch sums the squares of a million float32 numbers on a CPU with an error of 5e-5, DeepSpeed in float64.
    straight = train(Case(precision="fp64", sizes=WIDE))
    losses = [loss for leg in passed for loss in leg.losses]
    assert losses == pytest.approx(straight.losses[: len(losses)], rel=0, abs=TOLERANCE)
    for before, after in pairwise(passed):
        assert after.taken_up == before.left, "parameters, moments and step counters, bit by bit"
