"""The engine of DeepSpeed's ZeRO: optimizer states, gradients or all of a model cut over all ranks, and kept in the node's
memory or on its disk where the recipe says so.

DeepSpeed runs forward, backward and step; AdamW is PyTorch's fused kernel here too, and gradients are summed in float32, never
averaged. Its checkpoints are not used: parameters and moments are given and taken by name, as every engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from outgrow.contracts import Batch, Layout
from outgrow.recipes.deepspeed import Folders, deepspeed_config
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Zero
from outgrow.trainers import extensions, scratch
from outgrow.trainers.engines.blocks import prepare_blocks
from outgrow.trainers.engines.engine import Mark, StepSums
from outgrow.trainers.engines.forward import Forward
from outgrow.trainers.engines.zero.runtime import join
from outgrow.trainers.engines.zero.shards import Shards, run_of_shard
from outgrow.trainers.regions import FlatPart, Held, TensorSource, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ZeroEngine:
    """``Engine`` on every rank of ``layout``; raises ``PlanError`` where tools to compile are missing for offload to NVMe."""

    def __init__(self, layout: Layout, recipe: Recipe, model: PreTrainedModel, device: torch.device, folders: Folders) -> None:
        assert isinstance(recipe.parallel, Zero)
        self._device = device
        self._stage = recipe.parallel.stage
        self._accumulation = layout.accumulation
        # Stage 3 divides by the ranks when it sums.
        self._scale = float(layout.world) if self._stage == 3 else 1.0
        join(device, folders.extensions)
        # DeepSpeed asks for its device when it is imported.
        from outgrow.trainers.engines.zero.deepspeed_engine import start_deepspeed

        prepare_blocks(model, recipe)
        self._model = model
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        largest = max(shape.numel() for shape in shapes.values())
        nvme = _prepare_disk(folders, device) if folders.offload is not None else ""
        self._deepspeed = start_deepspeed(model, recipe, deepspeed_config(layout, recipe, nvme, largest), device)
        self._zero: Any = self._deepspeed.optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._frozen = {name: parameter for parameter, name in names.items() if not parameter.requires_grad}
        self._shards = Shards(self._zero, self._stage, names, shapes)
        self._norm = self._take_over_norm()
        self._forward = Forward(model, recipe, device, through=self._deepspeed)
        self._grad_norm = torch.zeros((), device=device)
        self._loss = torch.zeros((), device=device)
        self._micro_batches = 0
        self._stale = True
        """Whether the parameters that compute are yet to be made of the float32 ones: a collective, so not done in ``load``."""

    def accumulate(self, batch: Batch, global_weight: float, mark: Mark) -> None:
        self._settle()
        self._micro_batches += 1
        self._model.train()
        self._deepspeed.set_gradient_accumulation_boundary(self._micro_batches == self._accumulation)
        loss = self._forward.nll(batch) / global_weight
        mark("backward")
        self._deepspeed.backward(loss * self._scale, scale_wrt_gas=False)
        self._loss = self._loss + loss.detach()

    def finish(self) -> StepSums:
        assert self._micro_batches == self._accumulation
        self._grad_norm = self._norm()
        sums = StepSums(self._loss, self._grad_norm.to(self._device))
        self._loss, self._micro_batches = torch.zeros((), device=self._device), 0
        return sums

    def apply(self, learning_rate: float) -> None:
        self._zero.set_lr(learning_rate)
        self._deepspeed.step()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self._settle()
        self._model.train(False)
        return self._forward.sums(batch)

    @torch.no_grad()
    def logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._settle()
        self._model.train(False)
        return self._forward.last_logits(token_ids, segments, positions)

    def tensors(self) -> dict[str, Held]:
        return self._shards.tensors()

    def load(self, source: TensorSource) -> None:
        self._stale = True
        for name, part in self.tensors().items():
            fill(part, name, source)
            self._shards.written()

    def load_frozen(self, source: TensorSource) -> None:
        self._fill_frozen(source, prefix="")

    def load_model(self, source: TensorSource, prefix: str = "") -> None:
        self._stale = True
        self._fill_frozen(source, prefix)
        for name, part in self.tensors().items():
            kind, _, parameter = name.partition("/")
            if kind == "model":
                fill(part, prefix + parameter, source)
                self._shards.written()

    def reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def _fill_frozen(self, source: TensorSource, prefix: str) -> None:
        for name, parameter in self._frozen.items():
            with _frozen_part(parameter, self._stage) as part:
                fill(part, prefix + name, source)

    def _take_over_norm(self) -> Callable[[], torch.Tensor]:
        """What works out the global gradient's norm, infinite where that is not finite; DeepSpeed's step is given the result of
        ``finish`` instead of asking all ranks again."""
        zero = self._zero
        if self._stage != 3:
            work_out: Callable[[], torch.Tensor] = zero.scaled_global_norm
            zero.scaled_global_norm = lambda: self._grad_norm
            return work_out
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms_of_groups = zero._get_norm_groups
        zero._get_norm_groups = lambda: [self._grad_norm]
        return lambda: combine_grad_norm_groups(norms_of_groups())

    @torch.no_grad()
    def _settle(self) -> None:
        """Put back what a checkpoint looked at, and after a load make the parameters that compute."""
        self._shards.put_back()
        if not self._stale:
            return
        self._stale = False
        if self._stage != 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(self._shards.num_groups):
            self._shards.open(group)
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._shards.put_back()
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def _prepare_disk(folders: Folders, device: torch.device) -> str:
    """This rank's own folder on the disk, with the extension at hand that reads and writes there."""
    assert folders.offload is not None
    extensions.require_tools(device.type)
    extensions.load(folders.extensions, extensions.load_async_io)
    return str(scratch.claim(folders.offload))


@contextmanager
def _frozen_part(parameter: Any, stage: int) -> Iterator[Held]:
    """What this rank has of a frozen parameter, to be filled; of one that lies on disk, in memory meanwhile."""
    if stage != 3:
        yield parameter.detach()
        return
    start, length = run_of_shard(parameter)
    shard = parameter.ds_tensor
    on_disk = shard.final_location is not None
    if on_disk:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield FlatPart(tuple(parameter.ds_shape), shard.dtype, shard.device, start, length, lambda: shard.detach()[:length])
    if on_disk:
        parameter.nvme_swapper.swap_out_and_release([parameter])
