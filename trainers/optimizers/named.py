"""What all optimizers over named parameters share: the norm of the gradients, clipping that never waits for the device, names.

The state is made at once, as zeros: its memory is taken before the first step, and checkpoints have the same names at every
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_CLIP_EPS = 1e-6
"""Added to the norm that gradients are divided by, as ``torch.nn.utils.clip_grad_norm_`` does."""

_RUN = 65536
"""Elements of a gradient whose squares a CPU adds up at once."""


class NamedOptimizer:
    """``Optimizer`` but for ``_update``, which moves every parameter by its clipped ``.grad``.

    ``state`` {parameter name: {state name: tensor}} is what a checkpoint keeps; whoever updates writes into these tensors.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], clip_norm: float) -> None:
        self._parameters = dict(parameters)
        self._clip_norm = clip_norm
        self._state: dict[str, dict[str, torch.Tensor]] = {}

    def _update(self, learning_rate: float) -> None:
        raise NotImplementedError

    def squared_norm(self) -> torch.Tensor:
        """The sum of squares of the gradients that this rank holds, a scalar on the device.

        A parameter that no token reached (an expert without tokens) counts, and is updated, with a gradient of zero.
        """
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        runs = [run for gradient in self._gradients() for run in _runs(gradient)]
        return torch.stack(torch._foreach_norm(runs)).square().sum()

    def step(self, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Scale the gradients down to the clipping norm, update, drop them. ``grad_norm``: the global one, on the device."""
        if self._clip_norm > 0:
            scale = (self._clip_norm / (grad_norm + _CLIP_EPS)).clamp(max=1.0)
            torch._foreach_mul_(self._gradients(), scale)
        self._update(learning_rate)
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """``model/<parameter>`` and ``optim/<parameter>/<state>``, views without a graph."""
        named = {f"model/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name in self._parameters:
            named |= {f"optim/{name}/{state}": value.detach() for state, value in self._state[name].items()}
        return named

    def _gradients(self) -> list[torch.Tensor]:
        return [local(parameter.grad) for parameter in self._parameters.values() if parameter.grad is not None]


def _runs(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
    """``gradient`` in parts whose norms lose nothing that counts.

    A CPU adds float32 squares up one after the other: the norm of 4 M numbers came out 8e-5 too small, that of 64 Ki 2e-7. A
    GPU adds them up as a tree.
    """
    return torch.split(gradient.flatten(), _RUN) if gradient.device.type == "cpu" else (gradient,)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of ``tensor``: a view where it is sharded, else itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def decays(parameter: torch.Tensor) -> bool:
    """Whether weight decay is for ``parameter``: not for norms, biases and all else of fewer than two dimensions."""
    return parameter.dim() >= 2


def fused_adamw(
    parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[torch.optim.AdamW | None, dict[str, dict[str, torch.Tensor]]]:
    """PyTorch's fused AdamW over ``parameters`` with zeros for its whole state, and that state by name; None over none.

    One implementation for all engines, so that losses agree.
    """
    if not parameters:
        return None, {}
    groups: Sequence[dict[str, object]] = [
        {"params": [p for p in parameters.values() if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if not decays(p)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
    for parameter in parameters.values():
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adamw, {name: adamw.state[parameter] for name, parameter in parameters.items()}


def take_step(adamw: torch.optim.AdamW | None, learning_rate: float) -> None:
    """One step of all groups at ``learning_rate``."""
    if adamw is None:
        return
    for group in adamw.param_groups:
        group["lr"] = learning_rate
    adamw.step()
