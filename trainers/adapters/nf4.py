"""Linear layers in 4 bits: NF4 with double quantisation (Dettmers et al. 2023), computed by bitsandbytes.

A layer's packed weight is a plain frozen parameter, ``[numel / 2 / itemsize, 1]`` in the dtype that computes, so that an engine
shards, gathers and places it like any other: FSDP2 cuts it by rows and gathers bytes. What makes numbers of it again (a scale
every 64 weights, in 8 bits, and a scale every 256 of those) is no parameter: it lies with the module on every rank, 1/64 byte a
weight. bitsandbytes' own layer keeps it on the parameter, which FSDP2 replaces, and repacks weights on a CPU without
being told; hence a ``forward`` of ours.

On a CPU a matrix is one row to bitsandbytes: its kernel for AVX-512 (0.50) gives numbers the scales of others wherever a row is
no whole number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
from torch import nn

from outgrow.errors import ModelError
from outgrow.trainers.models.families import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Weights that share a scale."""
SCALES_BLOCK = 256
"""Scales that share a scale."""
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BASE_LAYER = "base_layer"
"""What peft calls the layer that it puts an adapter beside."""


class Nf4Linear(Linear4bit):
    """A linear layer of ``weight`` packed and ``quant_state``, which ``attach_quant_states`` gives it; ``bias`` as it was."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=compute_dtype,
            device="meta",
        )
        packed = torch.empty(packed_shape(tuple(linear.weight.shape), compute_dtype), dtype=compute_dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.quant_state is not None, "attach_quant_states comes before the first batch"
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y: torch.Tensor
        if torch.is_grad_enabled() or x.device.type == "cpu":
            y = _Product.apply(x.to(self.compute_dtype), self.weight, bias, self.quant_state, self.in_features)  # type: ignore[no-untyped-call]
        else:  # for the few rows of a generated token it has kernels that unpack on the way
            y = matmul_4bit(x.to(self.compute_dtype), self.weight, quant_state=self.quant_state, bias=bias)
        return y.to(x.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight as numbers [out_features, in_features] in the compute dtype; whole, where FSDP2 has gathered the layer."""
        return _numbers(self.weight.detach(), self.quant_state, self.in_features)

    @property
    def W_q(self) -> torch.Tensor:
        """The packed weight. peft asks a layer that has this name for ``dequantize()``, to know the lengths of DoRA."""
        return self.weight


class _Product(torch.autograd.Function):
    """``x W^T + bias``, of which the packed weight alone is kept: its numbers are made again for the gradient of ``x``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, state: QuantState, width: int
    ) -> torch.Tensor:
        # The parameter itself, not as a saved tensor: after the forward pass FSDP2 empties its storage and fills that again,
        # DeepSpeed takes the storage away and gives the parameter another. Nobody notices a weight that was changed meanwhile.
        ctx.weight = (packed, state, width)
        return nn.functional.linear(x, _numbers(packed, state, width), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x = gradient @ _numbers(*ctx.weight) if ctx.needs_input_grad[0] else None
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None, None


def _numbers(packed: torch.Tensor, state: QuantState | None, width: int) -> torch.Tensor:
    weight: torch.Tensor = dequantize_4bit(packed, state)
    return weight.view(-1, width)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What makes numbers of a packed weight: ``codes`` uint8 [blocks], of which ``nested`` float32 [blocks / 256] are the
    scales and ``offset`` float32 [] the mean."""

    codes: torch.Tensor
    nested: torch.Tensor
    offset: torch.Tensor


class QuantisedSource(Protocol):
    """Where the scales of the layers come from; names are those of the base, without adapters."""

    def scales(self, weight: str) -> Scales:
        """Of the weight with this name, on the CPU."""


def swap_linears(model: PreTrainedModel, names: Collection[str], compute_dtype: torch.dtype) -> None:
    """Put an ``Nf4Linear`` in the place of each linear layer of ``names`` (modules), its weight packed, on meta and frozen.

    Raises ``ModelError`` for layers that cannot be kept in 4 bits, for none at all, and for a model with matrices outside of
    linear layers.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise ModelError(f"NF4 computes in float32 or 16 bits, not in {compute_dtype}", hint="precision: bf16 or fp32")
    if not names:
        raise ModelError(
            "no linear layer of the blocks is frozen, so there is none to keep in 4 bits",
            where="adapter.base",
            hint="adapter.base: full, or make adapter.fully_trained narrower",
        )
    _refuse_other_matrices(model)
    problems = [problem for name in names if (problem := _fault(model.get_submodule(name), compute_dtype))]
    if problems:
        raise ModelError(
            "NF4 cannot hold " + "; ".join(sorted(set(problems))),
            where="adapter.base",
            hint="adapter.base: full keeps them in the precision of the run",
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), child, Nf4Linear(linear, compute_dtype))


def attach_quant_states(model: nn.Module, source: QuantisedSource, device: torch.device) -> None:
    """Give every ``Nf4Linear`` of ``model`` its scales, whole on every rank; to be called once its weights are loaded."""
    for name, layer in quantised_layers(model):
        layer.quant_state = quant_state(
            source.scales(f"{name}.weight"), (layer.out_features, layer.in_features), layer.compute_dtype, device
        )


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Nf4Linear]]:
    """The layers in 4 bits, each with the name that it has in the base, before an adapter was put beside it."""
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            yield name.removesuffix(f".{_BASE_LAYER}"), module


def packed_shape(shape: tuple[int, ...], storage: torch.dtype) -> tuple[int, int]:
    """Shape of the packed weight of a matrix of ``shape``, in elements of ``storage``."""
    return (math.prod(shape) // (2 * storage.itemsize), 1)


def scale_counts(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many codes of scales a matrix of ``shape`` has, and how many scales of those."""
    codes = -(-math.prod(shape) // BLOCK)
    return codes, -(-codes // SCALES_BLOCK)


def quantise(weight: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` packed in ``storage`` [n, 1], and float32 scales [blocks], both on its device.

    What holds a multiple of ``BLOCK`` weights gives the same beside others as alone: a matrix may come in parts.
    """
    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4", quant_storage=storage)
    return packed, state.absmax


def quantise_scales(scales: torch.Tensor) -> Scales:
    """The second quantisation, of all scales of one matrix. On the CPU in any case: means of a GPU's sums may differ."""
    scales = scales.float().cpu()
    offset = scales.mean(dtype=torch.float64).float()
    codes, state = quantize_blockwise(scales - offset, code=nested_code(), blocksize=SCALES_BLOCK)
    return Scales(codes=codes, nested=state.absmax, offset=offset)


def quant_state(scales: Scales, shape: tuple[int, int], compute_dtype: torch.dtype, device: torch.device) -> Any:
    """bitsandbytes' object of the scales of a matrix of ``shape``, on ``device``; on a CPU that of one row.

    Its dtype is what computes, whatever the weights were quantised from: forward and backward then see the same numbers.
    """
    nested = QuantState(  # type: ignore[no-untyped-call]
        absmax=scales.nested.to(device), blocksize=SCALES_BLOCK, code=nested_code().to(device), dtype=torch.float32
    )
    return QuantState(  # type: ignore[no-untyped-call]
        absmax=scales.codes.to(device),
        shape=torch.Size((1, math.prod(shape)) if device.type == "cpu" else shape),
        code=get_4bit_type("nf4", device=device),  # type: ignore[no-untyped-call]
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=compute_dtype,
        offset=scales.offset.to(device),
        state2=nested,
    )


def dequantised(packed: torch.Tensor, scales: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The ``count`` numbers [count] in ``dtype`` that packed weights stand for, with the float32 scale of each block."""
    state = QuantState(absmax=scales, shape=torch.Size((1, count)), blocksize=BLOCK, quant_type="nf4", dtype=dtype)  # type: ignore[no-untyped-call]
    numbers: torch.Tensor = dequantize_4bit(packed, state)
    return numbers.view(-1)


def nested_code() -> torch.Tensor:
    """What the 256 codes of scales stand for, float32 on the CPU."""
    code: torch.Tensor = create_dynamic_map()  # type: ignore[no-untyped-call]
    return code


def _fault(module: nn.Module, storage: torch.dtype) -> str:
    """Why a layer cannot be kept in 4 bits; empty where it can."""
    if not isinstance(module, nn.Linear) or isinstance(module, Nf4Linear):
        return f"a layer of kind {type(module).__name__}; allowed: linear layers"
    rows, columns = module.weight.shape
    if columns % 2 or rows * columns % (2 * storage.itemsize):
        return (
            f"a matrix of {rows} x {columns}: its half bytes fill no whole number of {storage}, in which ranks share them; "
            f"allowed: even widths, and {2 * storage.itemsize} weights or a multiple of that"
        )
    return ""


def _refuse_other_matrices(model: PreTrainedModel) -> None:
    """Raise ``ModelError`` where blocks hold matrices that are no linear layers: they would stay whole without a word."""
    inside = {name for name, module in model.named_modules() if any(module is block for block in blocks(model))}
    others = sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 2 and any(name.startswith(f"{block}.") for block in inside)
    )
    if others:
        raise ModelError(
            f"{model.config.model_type} keeps matrices outside of linear layers, which NF4 cannot hold: {others[0]} "
            f"and {len(others) - 1} more",
            where="adapter.base",
            hint="adapter.base: full; of mixtures of experts, mixtral keeps its experts as linear layers",
        )
