"""Memory for a model that was built without any: parameters from meta to the device, buffers moved as they are.

``Module.to_empty`` would turn buffers into garbage (rotary frequencies are in no state dict, so nothing would bring them
back) and break ties between plain parameters.
"""

from __future__ import annotations

import torch
from torch import nn


def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give every meta parameter of ``model`` uninitialised memory on ``device``, in ``dtype`` if given; ties stay ties.

    Parameters may be DTensors: each rank allocates its own part alone.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                memory = torch.empty_like(parameter, device=device, dtype=dtype or parameter.dtype)
                made[parameter] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, buffer.to(device))
