"""Memory for a model that was built without any: parameters from meta to the device, buffers moved as they are.

``Module.to_empty`` would turn buffers into garbage (rotary frequencies are in no state dict, so nothing would bring them
back) and break ties between plain parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def materialise(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None = None,
    parameters_on: torch.device | None = None,
    then: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Give every meta parameter of ``model`` uninitialised memory on ``device``, or on ``parameters_on``; ties stay ties.

    ``dtype`` is that of the parameters that are trained; frozen ones keep their own, which may be packed. Parameters may be
    DTensors: each rank allocates its own part alone. ``then`` is called with each parameter before the next one is made.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                wanted = dtype if parameter.requires_grad else None
                made[parameter] = _with_memory(parameter, parameters_on or device, wanted or parameter.dtype)
                if then is not None:
                    then(made[parameter])
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, buffer.to(device))


def _with_memory(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A parameter like ``parameter``, of its class and with its attributes, which a model of the user's own may give it."""
    if isinstance(parameter, DTensor):
        return nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype), requires_grad=parameter.requires_grad)
    memory = torch.empty(parameter.shape, device=device, dtype=dtype)
    made: nn.Parameter = torch.Tensor._make_subclass(type(parameter), memory, parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made
