"""Which part of a named tensor a rank holds, and where to read that part from.

A parameter or optimizer state is known by its name and full shape, whatever the engine. A rank holds a box of it. Seeded
initialisation, a Hugging Face folder and a checkpoint are all a ``TensorSource``: asked for a box, they give its values; so one
loop fills a model of any layout, and no rank holds more than one whole tensor at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from outgrow.errors import ModelError


@dataclass(frozen=True)
class Region:
    """A box of a full tensor: where it starts and how long it is, one number a dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Region) -> Region | None:
        """The box that both cover; None where they do not meet."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True))
        shape = tuple(e - s for s, e in zip(start, stop, strict=True))
        return Region(start, shape) if all(n > 0 for n in shape) else None

    def within(self, outer: Region) -> tuple[slice, ...]:
        """The slices that cut this box out of a tensor that holds ``outer``."""
        return tuple(slice(o - p, o - p + n) for o, p, n in zip(self.offset, outer.offset, self.shape, strict=True))


class TensorSource(Protocol):
    """Named tensors that can be read box by box."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, region: Region) -> torch.Tensor:
        """The values of ``region``, shape ``region.shape``, on the CPU, in the source's own dtype."""


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Region]:
    """What this rank holds of a tensor (a view, not a copy), and which box of the full tensor that is.

    A plain tensor is held whole; of a DTensor the box may be empty (a dimension of 0) where ranks outnumber rows.
    """
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return tensor.to_local(), Region(tuple(offset), tuple(shape))
    return tensor, Region((0,) * tensor.dim(), tuple(tensor.shape))


def fill(tensor: torch.Tensor, name: str, source: TensorSource) -> None:
    """Copy this rank's part of ``name`` from ``source`` into ``tensor``, cast to its dtype and moved to its device.

    Raises ``ModelError`` where the source has it at another full shape: a part of it would fit without being right.
    """
    if source.shape(name) != tuple(tensor.shape):
        raise ModelError(f"{name} has shape {source.shape(name)}; the model needs {tuple(tensor.shape)}")
    part, region = local_part(tensor)
    if region.numel:
        with torch.no_grad():
            part.copy_(source.read(name, region))
