"""Building a module without memory for its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are registered meanwhile go to meta, and one that is registered twice stays one.

    accelerate's ``init_empty_weights`` makes a new object at each registration, which unties: transformers ties again
    afterwards, a factory does not.
    """
    register, made = nn.Module.register_parameter, WeakIdKeyDictionary()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in made:
                made[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            parameter = made[parameter]
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` gives a meta tensor.

    Otherwise a parameter moves to meta after it was made; under deterministic algorithms torch fills every empty tensor, so
    that each parameter would be in memory, and written, once.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})
