"""Tensors kept in 8 bits: a code a number, and a float32 scale for every 256 of them within a row.

The codes are the dynamic ones of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization"): relative precision over
seven decades. A row is what one index of the first dimension names, and no block goes beyond one: cutting a tensor into rows,
as sharding does, cuts no block, and so every number of ranks keeps the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from outgrow.trainers.optimizers.named import local

BLOCK = 256
"""Numbers that share a scale; the last block of a row may have fewer."""
_PIECE = 1 << 22
"""Numbers that are decoded at a time: what is decoded is many times as large as its codes."""


@cache
def codebook(signed: bool, device: torch.device) -> torch.Tensor:
    """256 numbers, ascending, float32: from -1 (0 without a sign) to 1, denser towards 0.

    Kept on the device: a copy in every step would wait for what runs there.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        borders = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        magnitudes = (10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2).tolist()
        values += magnitudes + ([-magnitude for magnitude in magnitudes] if signed else [])
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes [rows, n] and float32 scales [rows, n/256 rounded up] of ``values`` [rows, n].

    The nearest code; a block of zeros has the scale 0.
    """
    rows, length = values.shape
    blocks = F.pad(values.float(), (0, -length % BLOCK)).view(rows, -1, BLOCK)
    scales = blocks.abs().amax(-1)
    book = codebook(signed, values.device)
    halfway = (book[:-1] + book[1:]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None], halfway, out_int32=True)
    return codes.to(torch.uint8).view(rows, -1)[:, :length], scales


def decode(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 [rows, n] that ``encode`` gave these for."""
    return codebook(signed, codes.device)[codes.int()] * scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def zero_codes(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the shape of ``like`` and their scales, [rows, blocks], which stand for zeros; sharded as ``like`` is."""
    for signed in (True, False):
        codebook(signed, like.device)  # made now, not in the first step
    scales = (like.shape[0], -(-prod(like.shape[1:]) // BLOCK))
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        return (
            sharded_zeros(*like.shape, dtype=torch.uint8, device_mesh=mesh, placements=placements),
            sharded_zeros(*scales, dtype=torch.float32, device_mesh=mesh, placements=placements),
        )
    return torch.zeros_like(like, dtype=torch.uint8), torch.zeros(scales, dtype=torch.float32, device=like.device)


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of this rank's parts of ``tensors`` of the same rows as matrices, some rows at a time and all of them."""
    parts = [local(tensor).flatten(1) for tensor in tensors]
    rows, length = parts[0].shape
    step = max(1, _PIECE // max(1, length))
    for start in range(0, rows, step):
        yield tuple(part[start : start + step] for part in parts)
