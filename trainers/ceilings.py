"""What a model costs in arithmetic, and what a device can do of it at most: by its vendor's word, and as a product measures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import nn

from outgrow.recipes.schema.training import Precision
from outgrow.trainers.models.custom import is_custom, looked_up
from outgrow.trainers.models.experts import expert_share, mixtures
from outgrow.trainers.models.families import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPE = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}

# Dense bfloat16 products with float32 accumulation, FLOP/s, by words that the name of the device holds; the first that fits.
# Data sheets state most of them with sparsity, which is twice as much.
_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),  # GB200 NVL72 data sheet: 360 PFLOPS sparse of 72
    ("B200", 2250e12),  # DGX B200 data sheet: 36 PFLOPS sparse of 8
    ("H200 NVL", 835.5e12),  # H200 data sheet: 1,671 sparse
    ("H200", 989.5e12),  # H200 data sheet, SXM: 1,979 sparse
    ("H100 PCIe", 756.5e12),  # H100 data sheet: 1,513 sparse
    ("H100 NVL", 835.5e12),  # H100 data sheet: 1,671 sparse
    ("H100", 989.5e12),  # H100 data sheet, SXM: 1,979 sparse
    ("A100", 312e12),  # A100 data sheet
    ("L40S", 362.05e12),  # L40S data sheet
    ("RTX 4090", 165.2e12),  # Ada architecture paper, appendix A
    ("RTX 5090", 209.5e12),  # RTX Blackwell architecture paper, appendix A
    ("RTX PRO 6000 Blackwell Max-Q", 438.9e12),  # RTX PRO Blackwell architecture paper: 188 SMs at 2.28 GHz
    ("RTX PRO 6000 Blackwell", 503.8e12),  # RTX PRO Blackwell architecture paper: 188 SMs at 2.617 GHz
)

_SLOWER = (" Laptop ", " D ")
"""Of cards that have the name of a faster one but for this word."""

_BUDGET_S = 0.1
"""Products are made for so long, and one more; the first one is not counted."""
_SMALLEST, _LARGEST = 256, 8192
_LONG_ENOUGH_S = 0.004
"""A product that takes so long is large enough to tell what the device can do."""


@dataclass(frozen=True)
class Arithmetic:
    """What decides a model's operations. ``parameters`` are all there are, ``used`` those that a token is multiplied with, and
    ``attention`` is layers x width of attention.

    Of ``used``, ``reached`` are those that the gradient passes on its way to the first that is trained, and ``trained`` those
    that have a gradient themselves; ``reached_attention`` is the part of ``attention`` that it passes. Where all of a model is
    trained, each is the whole.
    """

    parameters: int
    used: float
    attention: int
    reached: float
    trained: float
    reached_attention: int

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward: 6 N + 12 x layers x width x sequence length where all is trained.

        Chowdhery et al. 2022 (PaLM), appendix B: no recomputed activations, and attention as if every token saw every other of
        its row. Of the 6, 2 are the forward pass, 2 the gradient of what went in, 2 that of the weights: a frozen one has 4.
        """
        weights = 2 * self.used + 2 * self.reached + 2 * self.trained
        return weights + (4.0 * self.attention + 8.0 * self.reached_attention) * sequence_length


def arithmetic_of(model: PreTrainedModel) -> Arithmetic:
    """The arithmetic of a whole model, before an engine shards it.

    Used are all parameters but the input embedding where the output has a matrix of its own; and of a mixture's experts as many
    as are chosen for a token. A weight that is packed in 4 bits counts as the numbers that it stands for.
    """
    config = model.config
    counts = _counts(model)
    parameters = sum(counts.values())
    if is_custom(config):  # no adapter stands beside one
        used, attention = float(parameters - looked_up(model)), config.num_hidden_layers * config.attention_width
        return Arithmetic(parameters, used, attention, reached=used, trained=used, reached_attention=attention)
    if not config.tie_word_embeddings:
        counts[model.get_input_embeddings().weight] = 0  # type: ignore[index]
    below = _below_the_first_trained(model)
    unreached = {parameter for block in below for parameter in block.parameters()}
    heads: int = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Arithmetic(
        parameters,
        used=_multiplied(model, counts),
        attention=config.num_hidden_layers * width,
        reached=_multiplied(model, {p: count for p, count in counts.items() if p not in unreached}),
        trained=_multiplied(model, {p: count for p, count in counts.items() if p.requires_grad}),
        reached_attention=(config.num_hidden_layers - len(below)) * width,
    )


def _counts(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many numbers each parameter stands for; tied ones once."""
    counts = {parameter: parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        if hasattr(module, "in_features") and (weight := module._parameters.get("weight")) is not None:
            counts[weight] = int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
    return counts


def _multiplied(model: PreTrainedModel, counts: Mapping[nn.Parameter, int]) -> float:
    """With how many of the numbers of ``counts`` a token is multiplied: of experts, with those of the chosen ones."""
    routed = [p for mixture in mixtures(model) for p in mixture.experts.parameters()]  # type: ignore[union-attr]
    return sum(counts.values()) - (1 - expert_share(model.config)) * sum(counts.get(parameter, 0) for parameter in routed)


def _below_the_first_trained(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that no gradient comes to: nothing in them nor before them is trained."""
    if model.get_input_embeddings().weight.requires_grad:
        return []
    return list(takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), blocks(model)))


def vendor_flops(device_name: str, precision: Precision) -> float | None:
    """FLOP/s of one device as its vendor states them, dense; None where that is not known here."""
    if precision != "bf16" or any(words in f"{device_name} " for words in _SLOWER):
        return None
    return next((flops for words, flops in _BF16_FLOPS if words in device_name), None)


def measured_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of the best of a few products of square matrices, in some tenths of a second.

    Draws no random number, and gives its memory back: call it before a model has memory.
    """
    size, best = _SMALLEST, 0.0
    deadline = time.perf_counter() + _BUDGET_S
    while True:
        seconds = _product_s(_matrix(size, device, precision))
        best = max(best, 2.0 * size**3 / seconds)
        if time.perf_counter() >= deadline:
            break
        if seconds < _LONG_ENOUGH_S and size < _LARGEST:
            size *= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _matrix(size: int, device: torch.device, precision: Precision) -> torch.Tensor:
    # Numbers like random ones: a device that multiplies ones draws less power, and its clock stays higher than in training.
    return torch.arange(size * size, device=device, dtype=torch.float32).sin_().view(size, size).to(_DTYPE[precision])


def _product_s(matrix: torch.Tensor) -> float:
    """Seconds of one product, after one that warms up."""
    out = matrix @ matrix
    _wait(matrix.device)
    start = time.perf_counter()
    torch.mm(matrix, matrix, out=out)
    _wait(matrix.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
