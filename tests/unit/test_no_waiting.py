"""No step reads a number from the device: what would make the CPU wait for a GPU raises here, inside of the engines' steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_cases import LENGTH, Case, born_engine, rows_of_steps
from packed import Row, batch, global_weight
from torch.utils._python_dispatch import TorchDispatchMode

from outgrow.trainers.engines import forward, unmarked
from outgrow.trainers.models import masks
from outgrow.trainers.optimizers import adamw_8bit

_WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select")
"""Operations whose result, or its shape, the CPU has to know; and so it has to where a mask is the index."""


class Waited(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises for an operation that waits, unless it is one on tensors that were on the CPU all the time: ``allowed``."""

    allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.name().startswith("aten::index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        if not self.allowed and (by_mask or func.name().startswith(_WAITING)):
            raise Waited(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoWaiting]:
    """What is read of the batch before it moves is allowed: the loader made it on the CPU, whatever the device."""
    mode = NoWaiting()

    def reading(function: Any) -> Any:
        def allowed(*args: Any, **kwargs: Any) -> Any:
            mode.allowed = True
            try:
                return function(*args, **kwargs)
            finally:
                mode.allowed = False

        return allowed

    monkeypatch.setattr(masks, "one_document_a_row", reading(masks.one_document_a_row))
    monkeypatch.setattr(forward, "counted_positions", reading(forward.counted_positions))
    monkeypatch.setattr(adamw_8bit, "SMALLEST", 1)
    # torch's fused kernel reads its counter of steps on a CPU; on a GPU that counter is on the device, and read there.
    monkeypatch.setattr(torch.optim.AdamW, "step", reading(torch.optim.AdamW.step))
    read = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        tensor.flatten()[:1].sum().item()  # a list goes past the mode, this does not
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    yield mode
    if dist.is_initialized():
        dist.destroy_process_group()


def unpacked(rows: list[Row]) -> list[Row]:
    return [documents[:1] for documents in rows]


CASES = {
    "plain": Case(precision="fp32"),
    "plain, bf16": Case(precision="bf16"),
    "fsdp2": Case(engine="fsdp2", precision="bf16", micro_rows=4, settings={"parallel": {"kind": "fsdp2"}}),
    "chunked": Case(precision="fp32", settings={"cross_entropy": {"kind": "chunked", "tokens": 50}}),
    "8 bit": Case(precision="fp32", settings={"optimizer": {"kind": "adamw_8bit", "learning_rate": 1e-3}}),
    "muon": Case(precision="fp32", settings={"optimizer": {"kind": "muon", "learning_rate": 1e-3}}),
    "selective": Case(precision="fp32", settings={"activation_checkpointing": {"kind": "selective"}}),
    "gemma2": Case(precision="fp32", family="gemma2"),
    "LoRA": Case(precision="fp32", settings={"adapter": {"kind": "lora", "rank": 4}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_nothing(name: str, no_waiting: NoWaiting) -> None:
    engine = born_engine(CASES[name])
    steps = [([batch(part, LENGTH) for part in (rows, unpacked(rows))], global_weight(rows)) for rows in rows_of_steps()[:2]]
    with no_waiting:
        for batches, weight in steps:
            for micro_batch in batches:
                engine.accumulate(micro_batch, weight, unmarked)
            engine.finish()
            engine.apply(1e-3)
        engine.evaluate(batches[0])


def test_the_guard_sees_what_waits(no_waiting: NoWaiting) -> None:
    numbers = torch.arange(3)
    for wait in (numbers.sum().item, numbers.tolist, lambda: bool(numbers[0]), lambda: numbers[numbers > 1]):
        with no_waiting, pytest.raises(Waited):
            wait()
