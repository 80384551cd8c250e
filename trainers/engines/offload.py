"""Activation offload: what blocks keep for the backward pass lies in the node's memory meanwhile.

Copies run on streams of their own. In the forward pass a block's activations leave while the next block computes; in the
backward pass those of a block come back while the block after it computes its gradients. So the activations of at most two
blocks are on the device besides those that are computed on, and nobody waits as long as copying takes less time than computing.
The memory of what has left is let go once the computing stream has waited for the copy, so that it is used anew in the order of
that stream: how far the CPU runs ahead of the device does not change the peak.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

_SMALLEST = 1 << 16
"""Elements; what is smaller stays on the device: the copy would cost more than it saves."""

_Packed: TypeAlias = "torch.Tensor | tuple[_Piece, torch.Size]"


def offload_activations(blocks: Sequence[nn.Module], smallest: int = _SMALLEST) -> None:
    """Make each block keep what it saves in host memory, pinned where it comes from a GPU. Losses stay bit-equal.

    To be called last of all that replaces ``forward``: of a block that is computed again, it is the inputs that leave. Tensors
    of fewer than ``smallest`` elements stay.
    """
    journey = _Journey(smallest)
    for block in blocks:
        block.forward = partial(_offloaded, block, block.forward, journey)


def _offloaded(block: nn.Module, forward: Callable[..., Any], journey: _Journey, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    journey.start(next(_tensors_in((args, kwargs))).device)
    luggage = journey.of_next_block(block, {_storage(tensor) for tensor in _tensors_in(kwargs)})
    with saved_tensors_hooks(luggage.pack, _unpack):
        output = forward(*args, **kwargs)
    luggage.close()
    return output


class _Journey:
    """The streams that activations travel on, and the two blocks that were the last to pack."""

    def __init__(self, smallest: int) -> None:
        self.smallest = smallest
        self.device_type = ""
        self.out: torch.cuda.Stream | None = None
        self.back: torch.cuda.Stream | None = None
        self._last: _Reference = _gone
        self._last_but_one: _Reference = _gone

    def start(self, device: torch.device) -> None:
        """Make the streams, before the first block; blocks are given this before there is a device that they compute on."""
        if not self.device_type:
            self.device_type = device.type
            if device.type == "cuda":
                self.out, self.back = _stream(device), _stream(device)

    def of_next_block(self, block: nn.Module, shared: set[int]) -> _Luggage:
        if (left := self._last_but_one()) is not None:
            left.let_go()
        luggage = _Luggage(self, block, shared, self._last)
        self._last_but_one, self._last = self._last, weakref.ref(luggage)
        return luggage


class _Luggage:
    """What one block saved in one forward pass; it lives as long as the graph holds a piece of it."""

    def __init__(self, journey: _Journey, block: nn.Module, shared: set[int], before: _Reference) -> None:
        self.journey = journey
        self._block = block
        self._shared = shared
        self._before = before
        self._packed: dict[tuple[Any, ...], _Piece] = {}
        self._pieces: list[weakref.ref[_Piece]] = []
        self._left: torch.cuda.Event | None = None

    def pack(self, tensor: torch.Tensor) -> _Packed:
        """A piece for ``tensor``, the same for what was saved more than once; or ``tensor`` itself, which then stays."""
        journey = self.journey
        if tensor.device.type != journey.device_type or tensor.numel() < journey.smallest or not tensor.is_contiguous():
            return tensor
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version)
        if key not in self._packed:
            if self._stays(_storage(tensor)):
                return tensor
            piece = _Piece(self, tensor)
            self._packed[key] = piece
            self._pieces.append(weakref.ref(piece))
        return self._packed[key], tensor.shape

    def _stays(self, storage: int) -> bool:
        """Whether all blocks share it (masks, rotations) or it is a parameter, which some engines gather as late as this."""
        return storage in self._shared or any(_storage(parameter) == storage for parameter in self._block.parameters())

    def close(self) -> None:
        """After the block's forward pass; nothing is packed any more."""
        # Until here the pieces held their tensors, so that no other tensor of the block could have the address of one of them.
        self._packed = {}
        if self.journey.out is not None:
            self._left = _event()
            self._left.record(self.journey.out)

    def let_go(self) -> None:
        """Give back the device memory of all that has left; the computing stream waits for the copies first."""
        if self._left is not None:
            torch.cuda.current_stream().wait_event(self._left)
        for piece in self._alive():
            piece.let_go()

    def fetch(self) -> None:
        """Set all pieces on their way back, and those of the block before, whose turn is next."""
        for luggage in (self, self._before()):
            for piece in luggage._alive() if luggage is not None else ():
                piece.fetch()

    def _alive(self) -> Iterator[_Piece]:
        return (piece for reference in self._pieces if (piece := reference()) is not None)


class _Piece:
    """One saved tensor, flat: on the device until it is let go, in host memory, and on the device again once fetched."""

    def __init__(self, luggage: _Luggage, tensor: torch.Tensor) -> None:
        self._luggage = luggage
        self._device = tensor.device
        self._there: torch.Tensor | None = tensor.detach().view(-1)
        self._arrived: torch.cuda.Event | None = None
        out = luggage.journey.out
        self._here = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=out is not None)
        if out is None:
            self._here.copy_(self._there)
            return
        out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(out):
            self._here.copy_(self._there, non_blocking=True)

    def let_go(self) -> None:
        self._there = None

    def fetch(self) -> None:
        if self._there is not None:
            return
        # Made on the computing stream, to be freed in its order too; the copy waits for what was queued there before.
        self._there = torch.empty_like(self._here, device=self._device)
        back = self._luggage.journey.back
        if back is None:
            self._there.copy_(self._here)
            return
        back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(back):
            self._there.copy_(self._here, non_blocking=True)
            self._arrived = _event()
            self._arrived.record(back)

    def take(self) -> torch.Tensor:
        self._luggage.fetch()
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        assert self._there is not None
        return self._there


_Reference: TypeAlias = "Callable[[], _Luggage | None]"


def _gone() -> None:
    return None


def _unpack(packed: _Packed) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    piece, shape = packed
    return piece.take().view(shape)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
