"""The engine of whole models: every rank has all of it, and the ranks' gradients are summed once a step.

It is ``PlainEngine`` on every rank, and a sum over the ranks that begins while the backward pass of the last micro-batch still
runs. PyTorch's ``DistributedDataParallel`` is not used: it averages where losses are already divided by the weight of the
global batch, and it sums the gradients of the module's own parameters, bfloat16 ones, where the optimizer steps float32 copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from outgrow.contracts import Batch, Layout
from outgrow.recipes.schema import Recipe
from outgrow.trainers.engines.engine import Mark, StepSums
from outgrow.trainers.engines.plain import PlainEngine
from outgrow.trainers.regions import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKET_BYTES = 25 * 1024 * 1024
"""Gradients that are summed by one message: large enough to fill a link, small enough to start early."""


class DdpEngine:
    """``Engine`` on every rank of ``layout``; needs a process group of ``layout.world`` ranks."""

    def __init__(self, layout: Layout, recipe: Recipe, model: PreTrainedModel, device: torch.device) -> None:
        self._accumulation = layout.accumulation
        self._micro_batches = 0
        self._plain = PlainEngine(recipe, model, device, dist.group.WORLD)
        self._sums = GradientSums(self._plain.trained())

    def accumulate(self, batch: Batch, global_weight: float, mark: Mark) -> None:
        self._micro_batches += 1
        if self._micro_batches == self._accumulation:
            self._sums.begin()
        self._plain.accumulate(batch, global_weight, mark)

    def finish(self) -> StepSums:
        assert self._micro_batches == self._accumulation
        self._micro_batches = 0
        self._sums.finish()
        return self._plain.finish()

    def apply(self, learning_rate: float) -> None:
        self._plain.apply(learning_rate)

    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._plain.evaluate(batch)

    def logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._plain.logits(token_ids, segments, positions)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._plain.tensors()

    def load(self, source: TensorSource) -> None:
        self._plain.load(source)

    def load_frozen(self, source: TensorSource) -> None:
        self._plain.load_frozen(source)

    def load_model(self, source: TensorSource, prefix: str = "") -> None:
        self._plain.load_model(source, prefix)

    def reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total


class GradientSums:
    """Sums gradients over all ranks bucket by bucket, while the backward pass that makes them still runs.

    ``trained``: pairs of a parameter that the model computes with, and the one (it may be the same) whose ``.grad`` is summed.
    Buckets go from the last parameter to the first, about as their gradients come to be, and start in that order on every rank:
    a bucket whose gradients come early waits for the one before it.
    """

    def __init__(self, trained: Sequence[tuple[nn.Parameter, nn.Parameter]], bucket_bytes: int = BUCKET_BYTES) -> None:
        backward = list(reversed(trained))
        self._buckets = _buckets([master for _, master in backward], bucket_bytes)
        self._begun = False
        self._awaited: list[int] = []
        self._works: list[dist.Work] = []
        place = {id(master): number for number, bucket in enumerate(self._buckets) for master in bucket}
        for computing, master in backward:
            hook = partial(self._made, place[id(master)])
            computing.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """The backward pass that comes is the step's last: each gradient is whole once it is made."""
        self._begun = True
        self._awaited = [len(bucket) for bucket in self._buckets]

    @torch.no_grad()
    def finish(self) -> None:
        """Every gradient is the sum over the ranks; where this rank made none in any micro-batch, it adds 0."""
        while len(self._works) < len(self._buckets):
            self._start()
        for work in self._works:
            work.wait()
        self._works, self._begun = [], False

    def _made(self, bucket: int, _: torch.Tensor) -> None:
        if not self._begun:
            return
        self._awaited[bucket] -= 1
        while len(self._works) < len(self._buckets) and not self._awaited[len(self._works)]:
            self._start()

    def _start(self) -> None:
        """Sum the next bucket. Its gradients become views of the message, so that they are there once and not copied back; a
        large one that is alone in its bucket is the message itself, and there never is a second one of it."""
        bucket = self._buckets[len(self._works)]
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
        message = torch.cat(flat) if len(flat) > 1 else flat[0]
        for parameter, part in zip(bucket, torch.split(message, [p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view(parameter.shape)
        work = dist.all_reduce(message, async_op=True)
        assert work is not None
        self._works.append(work)


def _buckets(parameters: Sequence[nn.Parameter], most_bytes: int) -> list[list[nn.Parameter]]:
    """``parameters`` in their order, in runs of one type and of at most ``most_bytes``, or of one that is larger."""
    buckets: list[list[nn.Parameter]] = []
    held = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not buckets or held + size > most_bytes or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += size
    return buckets
