"""Optimizers over some parameters without a model; run as a script it is one rank of several that share them in rows.

    python tests/optimizer_cases.py RANK WORLD FOLDER

meets the other ranks through a file in the folder; rank 0 writes ``FOLDER/worst.json``: by how much, at most, shards differ
from the whole after some steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from outgrow.processes import end_rank
from outgrow.recipes.schema import optimizer as settings
from outgrow.trainers.optimizers import make_optimizer
from outgrow.trainers.regions import Region, fill

KINDS: Mapping[str, settings.Optimizer] = {
    "adamw": settings.AdamW(learning_rate=1e-2),
    "adamw_8bit": settings.AdamW8bit(kind="adamw_8bit", learning_rate=1e-2, clip_norm=0.5),
    "muon": settings.Muon(kind="muon", learning_rate=1e-2, adamw_learning_rate=3e-3, clip_norm=0.5),
}
SHAPES = {
    "embed": (67, 96),
    "block.matrix": (70, 130),
    "block.experts": (3, 40, 52),
    "block.norm": (33,),
    "block.small": (5, 7),
}
"""Rows that divide by no number of ranks, rows that are no multiple of 256, and a stack of fewer matrices than ranks."""
IN_BLOCKS = [name for name in SHAPES if name.startswith("block")]


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in SHAPES.items()}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of sizes that differ by some decades from column to column, as those of real models do."""
    generator = torch.Generator().manual_seed(100 + step)
    found = {}
    for name, shape in SHAPES.items():
        sizes = 10.0 ** torch.linspace(-4, 0, shape[-1])
        found[name] = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    return found


def moved(kind: str, steps: int = 5, dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], Any]:
    named = parameters(dtype)
    optimizer = make_optimizer(named, KINDS[kind], IN_BLOCKS)
    for step in range(steps):
        give(named, gradients(step, dtype))
        optimizer.step(KINDS[kind].learning_rate / (step + 1), optimizer.squared_norm().sqrt())
    return named, optimizer


def give(named: Mapping[str, nn.Parameter], found: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in named.items():
        parameter.grad = found[name].clone()


class Kept:
    """Whole tensors as a ``TensorSource``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, region: Region) -> torch.Tensor:
        return self._tensors[name][region.slices]


def _rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    worst: dict[str, float] = {"codes that differ": 0.0}
    for kind in ("adamw_8bit", "muon"):
        whole, reference = moved(kind)
        sharded = {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in parameters().items()}
        optimizer = make_optimizer(sharded, KINDS[kind], IN_BLOCKS)
        for step in range(5):
            give(sharded, {name: distribute_tensor(g, mesh, [Shard(0)]) for name, g in gradients(step).items()})
            squared = optimizer.squared_norm()
            dist.all_reduce(squared)
            optimizer.step(KINDS[kind].learning_rate / (step + 1), squared.sqrt())
        tensors = optimizer.tensors()
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in reference.tensors().items()
        }
        worst[kind] = max(float((_full(p) - whole[name].detach()).abs().max()) for name, p in sharded.items())
        for name, tensor in reference.tensors().items():
            found = _full(tensors[name])
            if tensor.dtype == torch.uint8:
                worst["codes that differ"] = max(worst["codes that differ"], float((found != tensor).float().mean()))
        # What was kept of the whole fills the shards.
        again = make_optimizer(
            {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in parameters().items()},
            KINDS[kind],
            IN_BLOCKS,
        )
        kept = Kept(reference.tensors())
        for name, tensor in again.tensors().items():
            fill(tensor, name, kept)
            assert torch.equal(_full(tensor), reference.tensors()[name]), name
    if rank == 0:
        (folder / "worst.json").write_text(json.dumps(worst))
    dist.barrier()
    end_rank(0)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
