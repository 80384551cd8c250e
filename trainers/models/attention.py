"""The attention that blocks compute with: which one a recipe gets, and those of ours that transformers calls by name.

transformers makes no mask for functions of ours; they work on what ``masks.attention_inputs`` made of the segments:

    outgrow_sdpa                torch's fused kernel: a mask, or none where each row is one document
    outgrow_flex                flex_attention: a block mask, soft caps too
    outgrow_varlen              ``torch.nn.attention.varlen``: the ends of the documents, and no L x L mask anywhere
    outgrow_flash_attention_2   the flash-attn package, likewise, soft caps too

``sdpa`` and ``eager`` of transformers itself serve families that are not tested here, and soft caps where nothing faster runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._triton import has_triton
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from outgrow.errors import ModelError
from outgrow.recipes.schema.speed import Attention
from outgrow.recipes.schema.training import Precision
from outgrow.trainers.models.custom import is_custom
from outgrow.trainers.models.families import TESTED, attention_implementation, layer_windows
from outgrow.trainers.models.graphs import allow_graphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SDPA, FLEX, VARLEN, FLASH = "outgrow_sdpa", "outgrow_flex", "outgrow_varlen", "outgrow_flash_attention_2"
_OURS: dict[Attention, str] = {"sdpa": SDPA, "flex": FLEX, "varlen": VARLEN, "flash_attention_2": FLASH}
_FASTEST_FIRST: tuple[Attention, ...] = ("flash_attention_2", "varlen", "flex", "sdpa", "eager")
_LARGEST_HEAD = 256
"""Dimensions of a head that flash attention takes, in steps of 8."""


def set_attention(model: PreTrainedModel, asked: Attention, precision: Precision, device: torch.device) -> None:
    """Let ``model`` compute with the attention that ``asked`` names, ``auto`` being the fastest that it can on ``device``.

    Raises ``ModelError`` where the model, the device or what is installed cannot, with what can.
    """
    if is_custom(model.config):
        if asked != "auto":
            raise ModelError(f"attention is {asked}, but a custom model computes its own", where="attention", hint="auto")
        return
    name = implementation(asked, model.config, precision, device)
    _register_kernel(name)
    model.config._attn_implementation = name


def implementation(asked: Attention, config: PretrainedConfig, precision: Precision, device: torch.device) -> str:
    """transformers' name of the attention; ``ModelError`` as ``set_attention``."""
    if asked == "auto":
        # Without a mask of L x L flex is the faster; it is compiled first, so plain attention has no need of it.
        capped = attention_implementation(config) == "eager"
        order = [kind for kind in _FASTEST_FIRST if capped or kind != "flex"]
        kind: Attention = next(kind for kind in order if not obstacle(kind, config, precision, device))
    elif why := obstacle(asked, config, precision, device):
        fit = [kind for kind in _FASTEST_FIRST if not obstacle(kind, config, precision, device)]
        hint = f"what can be had here: auto, {', '.join(fit)}"
        raise ModelError(f"attention is {asked}: {why}", where="attention", hint=hint)
    else:
        kind = asked
    return _OURS.get(kind, kind) if config.model_type in TESTED else kind


def obstacle(kind: Attention, config: PretrainedConfig, precision: Precision, device: torch.device) -> str:
    """Why a model cannot compute with ``kind``; empty where it can."""
    if kind == "eager":
        return ""
    if kind == "sdpa":
        return "it would leave out the soft cap of the scores" if attention_implementation(config) == "eager" else ""
    if config.model_type not in TESTED:
        return f"it is not known to be right for {config.model_type}, only for {', '.join(TESTED)}"
    if kind == "flex":
        return _flex_obstacle(precision, device)
    if device.type != "cuda":
        return "its kernels are for GPUs"
    if precision != "bf16":
        return "its kernels compute in 16 bits; precision: bf16 would do"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head > _LARGEST_HEAD or head % 8:
        return f"a head has {head} dimensions; it takes multiples of 8 up to {_LARGEST_HEAD}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than its kernels, which are for Ampere and later"
    if kind == "flash_attention_2":
        return _flash_fails(device) if find_spec("flash_attn") else "flash-attn is not installed; pip install flash-attn"
    return _varlen_obstacle(config)


@cache
def _flash_fails(device: torch.device) -> str:
    """Why flash-attn, which is installed, cannot compute on ``device``: it is built for one torch, and for cards by name."""
    try:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found]

        token = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
        flash_attn_func(token, token, token)
        torch.cuda.synchronize(device)
    except (ImportError, OSError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        return f"flash-attn is installed, but fails with this torch on {torch.cuda.get_device_name(device)}: {said}"
    return ""


def _flex_obstacle(precision: Precision, device: torch.device) -> str:
    if device.type != "cuda":
        return "flex_attention has no backward pass on a CPU"
    if precision == "fp64":
        return "its kernels do not compute in float64"
    return "" if has_triton() else "its kernels are compiled by Triton, which is not installed"


def _varlen_obstacle(config: PretrainedConfig) -> str:
    kernel = _varlen_kernel()
    if kernel is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if attention_implementation(config) == "eager":
        return "it would leave out the soft cap of the scores"
    windows = any(window is not None for window in layer_windows(config).values())
    if windows and "window_size" not in inspect.signature(kernel).parameters:
        return f"that of torch {torch.__version__} knows no windows"
    return ""


class _Kernel(Protocol):
    """Causal attention within documents that lie one behind the other: [tokens, heads, width], fewer heads in key and value."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    together = groups > 1 and takes_fewer_key_heads(query, attention_mask)
    if groups > 1 and not together:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scaling, enable_gqa=together
    )
    return output.transpose(1, 2).contiguous(), None


def takes_fewer_key_heads(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether SDPA has a kernel that keeps no scores for fewer heads of keys than of queries; to repeat them costs a copy.

    On a GPU flash attention does (aten's cuda/sdp_utils.cpp): 16 bits, no mask, heads up to 256 wide, but on some cards not of
    193 to 224; cuDNN's does where sums need no fixed order, which is not the default here. What they refuse goes to the kernel
    that repeated keys are for, not to plain products with L x L scores.
    """
    if not query.is_cuda:
        return True
    width = query.shape[-1]
    fits = width <= _LARGEST_HEAD and not 192 < width <= 224
    return mask is None and query.dtype in (torch.bfloat16, torch.float16) and fits


def _flex(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    def capped(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    output: torch.Tensor = _flex_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    uncompiled: Callable[..., Any] = flex_attention
    return uncompiled if torch.compiler.is_compiling() else _compiled_flex_attention()


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    allow_graphs()
    return torch.compile(flex_attention, dynamic=False)


def by_documents(kernel: _Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
    """An attention function of transformers around a kernel that takes documents one behind the other.

    ``cu_seq_lens_q`` int32 [documents + 1] and ``max_length_q`` come through the keyword arguments of the model.
    """

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        *,
        cu_seq_lens_q: torch.Tensor,
        max_length_q: int,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        rows, heads, length, width = query.shape
        query, key, value = (t.transpose(1, 2).reshape(rows * length, -1, width) for t in (query, key, value))
        scale = width**-0.5 if scaling is None else scaling
        output = kernel(query, key, value, cu_seq_lens_q, max_length_q, scale=scale, window=sliding_window, softcap=softcap)
        return output.reshape(rows, length, heads, width), None

    return attention


@cache
def _varlen_kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _varlen() -> _Kernel:
    varlen_attn = _varlen_kernel()
    assert varlen_attn is not None
    known = frozenset(inspect.signature(varlen_attn).parameters)

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if "window_size" in known:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if "scale" in known:
            options["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output: torch.Tensor = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
        return output

    return kernel


def _flash() -> _Kernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        output: torch.Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            ends,
            ends,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    return kernel


_KERNELS: Mapping[str, Callable[[], _Kernel]] = {VARLEN: _varlen, FLASH: _flash}
"""What fetches a kernel that may not be installed."""


def _register_kernel(name: str) -> None:
    """Let transformers find the attention ``name`` if it is one of a kernel that is fetched; once a process.

    Not as a block calls it: the compiler would trace the import and the caches. Nor anew for every model: blocks that are
    compiled already would be compiled again for another function.
    """
    if name not in _KERNELS or name in ALL_ATTENTION_FUNCTIONS:
        return
    try:
        kernel = _KERNELS[name]()
    except (ImportError, OSError) as error:  # as of one that was built for another torch
        raise ModelError(
            f"the kernel of {name} cannot be imported: {error}",
            where="attention",
            hint=f"attention=sdpa, or install it as built for torch {torch.__version__}",
        ) from error
    AttentionInterface.register(name, by_documents(kernel))


AttentionInterface.register(SDPA, _sdpa)
AttentionInterface.register(FLEX, _flex)
