"""The engine without wrapping: one rank, one device, the whole model on it. It is what the others are measured against.

In bfloat16 the arithmetic is that of FSDP2's mixed precision: parameters, gradients and the optimizer in float32, and a
bfloat16 copy of the parameters that computes; each micro-batch's bfloat16 gradient is added to the float32 one. In float32 and
float64 the model computes on the parameters themselves. Frozen parameters are there once, in the type that they compute in.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from outgrow.contracts import Batch
from outgrow.recipes.schema import Recipe
from outgrow.trainers.engines.blocks import prepare_blocks
from outgrow.trainers.engines.engine import Mark, StepSums
from outgrow.trainers.engines.forward import Forward
from outgrow.trainers.engines.materialise import materialise
from outgrow.trainers.engines.replicas import fill_all
from outgrow.trainers.models.families import names_in_blocks
from outgrow.trainers.optimizers import make_optimizer
from outgrow.trainers.regions import TensorSource, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlainEngine:
    """``Engine`` on one rank; or one of ``replicas``, all alike, whose gradients are summed by who made it."""

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel, device: torch.device, replicas: dist.ProcessGroup | None = None
    ) -> None:
        self._device = device
        self._replicas = replicas
        self._model = model
        prepare_blocks(model, recipe)
        materialise(model, device, torch.bfloat16 if recipe.precision == "bf16" else None)
        parameters = dict(model.named_parameters())
        self._frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        self._computing = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._masters = _float32_masters(self._computing) if recipe.precision == "bf16" else self._computing
        self._filled = {name: self._masters.get(name, parameter) for name, parameter in parameters.items()}
        self._optimizer = make_optimizer(self._masters, recipe.optimizer, names_in_blocks(model))
        self._forward = Forward(model, recipe, device)
        self._loss = torch.zeros((), device=device)
        self._grad_norm = torch.zeros((), device=device)

    def accumulate(self, batch: Batch, global_weight: float, mark: Mark) -> None:
        self._model.train()
        loss = self._forward.nll(batch) / global_weight
        mark("backward")
        torch.autograd.backward(loss)
        self._loss = self._loss + loss.detach()

    def finish(self) -> StepSums:
        self._grad_norm = self._optimizer.squared_norm().sqrt()
        sums = StepSums(self._loss, self._grad_norm)
        self._loss = torch.zeros((), device=self._device)
        return sums

    def apply(self, learning_rate: float) -> None:
        self._optimizer.step(learning_rate, self._grad_norm)
        self._renew_copy()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self._model.train(False)
        return self._forward.sums(batch)

    @torch.no_grad()
    def logits(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._model.train(False)
        return self._forward.last_logits(token_ids, segments, positions)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._optimizer.tensors()

    def load(self, source: TensorSource) -> None:
        for name, tensor in self.tensors().items():
            fill(tensor, name, source)
        self._renew_copy()

    def load_frozen(self, source: TensorSource) -> None:
        fill_all(self._frozen, source, replicas=self._replicas)

    def load_model(self, source: TensorSource, prefix: str = "") -> None:
        fill_all(self._filled, source, prefix, self._replicas)
        self._renew_copy()

    def trained(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each trained parameter as the model computes with it, and as the optimizer steps it, with the gradient."""
        return [(computing, self._masters[name]) for name, computing in self._computing.items()]

    def reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    @torch.no_grad()
    def _renew_copy(self) -> None:
        if self._masters is not self._computing:
            torch._foreach_copy_(list(self._computing.values()), list(self._masters.values()))


def _float32_masters(computing: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """A float32 parameter for each bfloat16 one, whose gradient gathers what every backward pass leaves in the other's."""
    masters = {}
    for name, parameter in computing.items():
        master = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
        parameter.register_post_accumulate_grad_hook(partial(_hand_over_gradient, master))  # type: ignore[no-untyped-call]
        masters[name] = master
    return masters


def _hand_over_gradient(master: nn.Parameter, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
