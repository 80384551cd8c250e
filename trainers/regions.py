"""Which part of a named tensor a rank holds, and where to read that part from.

A parameter or optimizer state is known by its name and full shape, whatever the engine. A rank holds a box of it. Seeded
initialisation, a Hugging Face folder and a checkpoint are all a ``TensorSource``: asked for a box, they give its values; so one
loop fills a model of any layout, and no rank holds more than one whole tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeAlias

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from outgrow.errors import ModelError


@dataclass(frozen=True)
class Region:
    """A box of a full tensor: where it starts and how long it is, one number a dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Region:
        """The box that covers all of a tensor of ``shape``."""
        lengths = tuple(shape)
        return cls((0,) * len(lengths), lengths)

    @property
    def numel(self) -> int:
        return prod(self.shape)

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


@dataclass(frozen=True)
class FlatPart:
    """A run of the elements of a full tensor in row-major order, as ZeRO cuts tensors: ``length`` of them from ``start`` on.

    ``shape`` and ``dtype`` are those of the full tensor. ``values`` gives the run as a view of one dimension: writing to it
    writes to the state. The state may lie on a disk; then the view holds until the values of another part are asked for.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    start: int
    length: int
    values: Callable[[], torch.Tensor]


Held: TypeAlias = torch.Tensor | FlatPart
"""What a rank holds of a full tensor: a plain tensor whole, of a DTensor a box, of a ``FlatPart`` a run."""


def run_boxes(shape: tuple[int, ...], start: int, length: int) -> Iterator[Region]:
    """The fewest boxes that cover elements ``start`` to ``start + length`` of a tensor of ``shape``, in their order.

    Of a vector it is one, of a matrix at most three: the rest of a row, whole rows, the begin of a row.
    """
    if length <= 0:
        return
    if not shape:
        yield Region((), ())
        return
    row = prod(shape[1:])
    stop = start + length
    first = -(-start // row) if len(shape) > 1 else start
    last = stop // row if len(shape) > 1 else stop
    if start < min(first * row, stop):
        # `min`: the run may begin and end within one row.
        yield from _in_row(shape, start // row, start % row, min(first * row, stop) - start)
    if first < last:
        yield Region((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if first <= last and last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, length: int) -> Iterator[Region]:
    for box in run_boxes(shape[1:], start, length):
        yield Region((row, *box.offset), (1, *box.shape))


def local_regions(held: Held) -> list[Region]:
    """The boxes of the full tensor that this rank holds, none of them empty; reads no value."""
    if isinstance(held, FlatPart):
        return list(run_boxes(held.shape, held.start, held.length))
    _, region = local_part(held)
    return [region] if region.numel else []


def local_parts(held: Held) -> list[tuple[torch.Tensor, Region]]:
    """A view of what this rank holds for each of ``local_regions``, in their order."""
    if not isinstance(held, FlatPart):
        part, region = local_part(held)
        return [(part, region)] if region.numel else []
    regions = local_regions(held)
    if not regions:
        return []
    run, parts = held.values(), []
    for region in regions:
        parts.append((run[: region.numel].view(region.shape), region))
        run = run[region.numel :]
    return parts


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Region]:
    """What this rank holds of a tensor (a view, not a copy), and which box of the full tensor that is.

    A plain tensor is held whole; of a DTensor the box may be empty (a dimension of 0) where ranks outnumber rows.
    """
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return tensor.to_local(), Region(tuple(offset), tuple(shape))
    return tensor, Region.whole(tensor.shape)


def fill(held: Held, name: str, source: TensorSource) -> None:
    """Copy this rank's part of ``name`` from ``source`` into ``held``, cast to its dtype and moved to its device.

    Raises ``ModelError`` where the source has it at another full shape: a part of it would fit without being right.
    """
    if source.shape(name) != tuple(held.shape):
        raise ModelError(f"{name} has shape {source.shape(name)}; the model needs {tuple(held.shape)}")
    with torch.no_grad():
        for part, region in local_parts(held):
            part.copy_(source.read(name, region))
