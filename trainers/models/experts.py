"""Mixtures of experts: every expert has a gradient in every backward pass, be it zero.

An expert that no token of a rank's micro-batch chose has no gradient on that rank, while it has one on another: the ranks
would then reduce gradients of different sizes, and FSDP2 hangs or mixes them up. So each mixture's output is passed through
a node of the autograd graph that changes nothing, and whose backward pass hands zeros to all of its experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What families call the number of a mixture's experts: Mixtral, Qwen and OLMoE, DeepSeek."""


class _ZeroGradients(torch.autograd.Function):
    """Its first argument unchanged; the gradient of all the others is zero."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.shapes = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # One zero seen at the parameter's shape: adding it to a gradient allocates nothing.
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.shapes)
        return (grads[0], *zeros)


def mixtures(model: nn.Module) -> list[nn.Module]:
    """The modules that route tokens to ``experts``."""
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def expert_share(config: PretrainedConfig) -> float:
    """Of the experts of a mixture, those that a token goes to; 1 where the configuration does not say how many there are."""
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = next((number for name in _EXPERT_COUNTS if (number := getattr(config, name, None))), None)
    return chosen / experts if experts and chosen else 1.0


def give_every_expert_a_gradient(model: nn.Module) -> None:
    """Hook every mixture of experts in ``model``; nothing to do for a dense model. Outputs stay bit-equal.

    The hook reads the parameters when it runs, so it sees those that FSDP2 has gathered just then.
    """
    for module in mixtures(model):
        module.register_forward_hook(_pass_through)


def _pass_through(module: nn.Module, args: Any, output: Any) -> Any:
    experts: nn.Module = module.experts  # type: ignore[assignment]
    parameters = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    if isinstance(output, tuple):
        return (_ZeroGradients.apply(output[0], *parameters), *output[1:])  # type: ignore[no-untyped-call]
    return _ZeroGradients.apply(output, *parameters)  # type: ignore[no-untyped-call]
