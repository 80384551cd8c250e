"""Checkpoints of real FSDP2 and HSDP ranks over gloo, saved and loaded at any world size.

Run as a script this file is the ranks: one process that forks each group, since importing torch takes longer than the work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import newest
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.reader import CheckpointReader, open_checkpoint
from outgrow.trainers.checkpoint.resume import resume
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.regions import Region, fill

Tensors = dict[str, torch.Tensor]


def build(layout: str, world: int, seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model whose shards are uneven, and empty on some ranks: 5 rows, 7 rows, and one row alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 1))
    if layout != "plain":
        if layout == "hsdp":
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh("cpu", (world,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)


def train(model: nn.Module, optimizer: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(model: nn.Module, optimizer: torch.optim.AdamW) -> Tensors:
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter
        tensors |= {f"optim/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def whole(tensors: Tensors) -> Tensors:
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for k, t in tensors.items()}


def read_whole(storage: Storage, run: str) -> Tensors:
    ref = newest(storage, run)
    assert ref is not None
    reader = open_checkpoint(storage, ref)
    return {name: reader.read(name, Region.whole(reader.shape(name))) for name in reader.names()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(storage: Storage, run: str, layout: str, rank: int, world: int) -> None:
    model, optimizer = build(layout, world, seed=1)
    train(model, optimizer, 3)
    tensors = tensors_of(model, optimizer)
    saver = Checkpointer(storage, Group(run, "one", rank, world), tensors, Retention(1, 0), chunk_bytes=100)
    written = torch.tensor([saver.buffer_bytes])
    saver.save(tensors, StepState(3, {}, {}, {}))
    expected = whole(tensors)
    train(model, optimizer, 1)
    saver.wait()
    assert saver.failures == 0, saver.results()
    if world > 1:
        dist.barrier()
        dist.all_reduce(written)
    assert written.item() == sum(t.numel() * t.element_size() for t in expected.values()), "each element is written once"
    assert same(read_whole(storage, run), expected)


def load(storage: Storage, run: str, layout: str, rank: int, world: int) -> None:
    """Fill a model that was trained otherwise, and hold it against what one process reads."""
    model, optimizer = build(layout, world, seed=2)
    train(model, optimizer, 1)
    tensors = tensors_of(model, optimizer)

    def fill_all(reader: CheckpointReader) -> None:
        for name, tensor in tensors.items():
            fill(tensor, name, reader)

    resumed = resume(storage, run, fill_all)
    assert resumed.reader is not None and resumed.reader.step == 3
    assert same(whole(tensors), read_whole(storage, run))


def load_all(storage: Storage, run: str, layout: str, rank: int, world: int) -> None:
    for other, size in LAYOUTS:
        load(storage, f"{other}{size}", layout, rank, world)


def run_group(root: str, action: Callable[..., None], layout: str, world: int) -> None:
    """``action`` on each rank of a group of forked processes; the parent's imports are theirs."""
    name = f"{layout}{world}"
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if world > 1:
                    store = f"file://{root}/{action.__name__}-{name}.store"
                    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
                action(Storage(root), name, layout, rank, world)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * world, f"{action.__name__} {name}: {codes}"
    print(f"{action.__name__} {name}", flush=True)


LAYOUTS = [("plain", 1), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]


def test_what_any_layout_saved_any_layout_loads(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    groups = [f"{layout}{world}" for layout, world in LAYOUTS]
    assert done.stdout.splitlines() == [*(f"save {group}" for group in groups), *(f"load_all {group}" for group in groups)]


def main(root: str) -> None:
    torch.set_num_threads(1)
    train(*build("plain", 1, seed=0), 1)
    for action in (save, load_all):
        for layout, world in LAYOUTS:
            run_group(root, action, layout, world)


if __name__ == "__main__":
    main(sys.argv[1])
