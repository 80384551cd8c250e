"""The engine that shards: PyTorch's FSDP2 (``fully_shard``) on every block, over a mesh of replicas x shards.

Embedding and head are each gathered and reduced as one too: left to the root, both would stay whole from the first layer's
forward to the end of the backward pass, with the head's gradient. Where they share their weights they are the root's.

Gradients are summed, never averaged: the loss of each rank is already divided by the weight of the global batch. Unless the
recipe says otherwise, every micro-batch's gradient is reduce-scattered at once and kept as this rank's float32 shard: keeping
it whole until the last micro-batch saves communication, but costs every rank a whole float32 model. Between replicas only the
step's sum is reduced.

With ``offload: cpu`` the shards, their gradients and the optimizer lie in the node's memory (pinned where the device is a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from outgrow.contracts import Batch, Layout
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Fsdp2
from outgrow.trainers.engines.blocks import prepare_blocks
from outgrow.trainers.engines.engine import Mark, StepSums
from outgrow.trainers.engines.forward import Forward
from outgrow.trainers.engines.materialise import materialise
from outgrow.trainers.engines.replicas import fill_all
from outgrow.trainers.models.families import blocks, embedding_and_head, names_in_blocks
from outgrow.trainers.optimizers import make_optimizer
from outgrow.trainers.regions import TensorSource, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Fsdp2Engine:
    """``Engine`` on every rank of ``layout``; needs a process group of ``layout.world`` ranks."""

    def __init__(self, layout: Layout, recipe: Recipe, model: PreTrainedModel, device: torch.device) -> None:
        settings = recipe.parallel if isinstance(recipe.parallel, Fsdp2) else Fsdp2(kind="fsdp2")
        self._device = device
        self._home = torch.device("cpu") if settings.offload == "cpu" else device
        self._accumulation = layout.accumulation
        self._reduces_each = settings.reduce_gradients == "each_micro_batch"
        mesh = _mesh(layout, device)
        self._shard_group = mesh.get_group("shard")
        self._replicas = mesh.get_group("replicate") if layout.replicate > 1 else None
        prepare_blocks(model, recipe)
        self._model = model
        self._root, *self._stay_whole = _shard(model, mesh, recipe, settings, device)
        materialise(model, device, parameters_on=self._home)
        # Held from the start: between forward and backward the modules show gathered parameters in place of these shards.
        self._parameters = dict(model.named_parameters())
        self._frozen = {name: parameter for name, parameter in self._parameters.items() if not parameter.requires_grad}
        trained = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._optimizer = make_optimizer(trained, recipe.optimizer, names_in_blocks(model))
        self._forward = Forward(model, recipe, device)
        self._loss = torch.zeros((), device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._micro_batches = 0

    def accumulate(self, batch: Batch, global_weight: float, mark: Mark) -> None:
        self._micro_batches += 1
        self._model.train()
        last = self._micro_batches == self._accumulation
        self._root.set_requires_gradient_sync(last or self._reduces_each)
        self._root.set_requires_all_reduce(last)
        loss = self._forward.nll(batch) / global_weight
        mark("backward")
        torch.autograd.backward(loss)
        self._loss = self._loss + loss.detach()

    def finish(self) -> StepSums:
        assert self._micro_batches == self._accumulation
        squared = self._optimizer.squared_norm().to(self._device)
        dist.all_reduce(squared, group=self._shard_group)
        self._grad_norm = squared.sqrt()
        sums = StepSums(self._loss, self._grad_norm)
        self._loss, self._micro_batches = torch.zeros((), device=self._device), 0
        return sums

    def apply(self, learning_rate: float) -> None:
        self._optimizer.step(learning_rate, self._grad_norm.to(self._home))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self._model.train(False)
        sums = self._forward.sums(batch)
        self._let_go()
        return sums

    @torch.no_grad()
    def logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._model.train(False)
        logits = self._forward.last_logits(token_ids, segments, positions)
        self._let_go()
        return logits

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._optimizer.tensors()

    def load(self, source: TensorSource) -> None:
        self._reshard_all()
        for name, tensor in self.tensors().items():
            fill(tensor, name, source)

    def load_frozen(self, source: TensorSource) -> None:
        self._reshard_all()
        fill_all(self._frozen, source, "", self._replicas, self._device)

    def load_model(self, source: TensorSource, prefix: str = "") -> None:
        self._reshard_all()
        fill_all(self._parameters, source, prefix, self._replicas, self._device)

    def reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def _let_go(self) -> None:
        """Reshard after a forward pass that no backward pass follows."""
        for module in (self._root, *self._stay_whole):
            module.reshard()

    def _reshard_all(self) -> None:
        """Let go of whole parameters that an evaluation left behind: they would compute in place of what is loaded now."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """``replicate`` x ``shard``, neighbouring ranks in one shard group; ``shard`` alone where there is one replica."""
    if layout.world == 1 and not dist.is_initialized():
        # One rank alone was started without a group; this one meets nobody, and who started the rank ends it.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    if layout.replicate == 1:
        return init_device_mesh(device.type, (layout.shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard"))


def _shard(model: PreTrainedModel, mesh: DeviceMesh, recipe: Recipe, settings: Fsdp2, device: torch.device) -> list[FSDPModule]:
    """``model`` itself in its new class, its parameters now DTensors on meta; then what else stays gathered after a forward
    pass, for the backward pass that begins with it."""
    precision = MixedPrecisionPolicy()
    if recipe.precision == "bf16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = OffloadPolicy()
    if settings.offload == "cpu":
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")

    def sharded(module: nn.Module, reshard_after_forward: bool) -> FSDPModule:
        return fully_shard(
            module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward, offload_policy=offload
        )

    embedding, head = embedding_and_head(model)
    units = [sharded(module, settings.reshard_after_forward) for module in (embedding, *blocks(model)) if module is not None]
    if isinstance(embedding, FSDPModule):
        embedding.set_unshard_in_backward(False)  # its gradient is of which rows were looked up, not of what they are
    # The backward pass begins with the head: gathered again at once, it would have been let go for nothing.
    stay_whole = [sharded(head, reshard_after_forward=False)] if head is not None else []
    units += stay_whole
    root = fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A factor alone asks for NCCL's PREMUL_SUM, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    _prefetch(root, units, settings.prefetch_blocks)
    return [root, *stay_whole]


def _prefetch(root: FSDPModule, units: Sequence[FSDPModule], ahead: int) -> None:
    """Gather so many units before the one that computes: those after it in the forward pass, those before it in the backward
    pass. The root's own parameters come first in both."""
    # The backward pass ends with the first unit that trains something.
    trains = [any(parameter.requires_grad for parameter in unit.parameters()) for unit in units]  # type: ignore[attr-defined]
    first = trains.index(True) if True in trains else 0
    for number, unit in enumerate(units):
        before = units[max(first, number - ahead) : number][::-1]
        unit.set_modules_to_forward_prefetch(list(units[number + 1 : number + 1 + ahead]))
        # Without a list FSDP2 takes the unit before by itself; one that is there already is gathered no second time.
        unit.set_modules_to_backward_prefetch(list(before) or [unit])
    root.set_modules_to_forward_prefetch(list(units[:ahead]))
    root.set_modules_to_backward_prefetch(list(units[::-1][:ahead]) or [root])
