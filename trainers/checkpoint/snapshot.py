"""One rank's share of a checkpoint, copied into host memory that was set aside before the first step.

The buffer is the data section of the rank's safetensors file itself: a save copies each tensor once, and what is written later
is the buffer as it lies. Parts that several ranks hold alike (replicas of HSDP, the optimizer's step counters) are spread over
them by size, by the same sum on every rank and so without a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch.distributed.tensor import DTensor, Partial

from outgrow.errors import TrainingError
from outgrow.trainers.checkpoint.format import Piece, TensorEntry, data_file
from outgrow.trainers.checkpoint.tensor_file import DTYPE_NAMES, encode_header, lay_out
from outgrow.trainers.regions import FlatPart, Held, Region, local_parts, local_regions


class Snapshot:
    """A place in memory for the parts of ``tensors`` that this rank owns; ``take`` fills it, again and again.

    ``header`` and ``data`` are the two halves of the rank's file. ``tensors`` says what is in it, as the index of pieces does.
    """

    def __init__(self, tensors: Mapping[str, Held], rank: int, world: int) -> None:
        owned = dict(owned_parts(tensors, rank, world))
        boxes = [(name, key, region) for name, regions in owned.items() for key, region in _keyed(name, regions)]
        slots = lay_out((key, tensors[name].dtype, region.shape) for name, key, region in boxes)
        self.header = encode_header(slots)
        self.buffer_bytes = slots[-1].stop if slots else 0
        # Filling it touches every page: the first save shall not pay for page faults.
        self._buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8).fill_(0)
        self._pinned = self.buffer_bytes > 0 and any(tensor.device.type == "cuda" for tensor in tensors.values())
        if self._pinned:
            _pin(self._buffer)
        places = {slot.key: self._buffer[slot.start : slot.stop].view(slot.dtype).view(slot.shape) for slot in slots}
        self._places = {name: [places[key] for key, _ in _keyed(name, regions)] for name, regions in owned.items()}
        self.data = self._buffer.numpy().data
        self.tensors = {
            name: TensorEntry(
                dtype=DTYPE_NAMES[tensors[name].dtype],
                shape=tuple(tensors[name].shape),
                pieces=tuple(
                    Piece(file=data_file(rank), key=key, offset=region.offset, shape=region.shape)
                    for key, region in _keyed(name, regions)
                ),
            )
            for name, regions in owned.items()
        }

    def take(self, tensors: Mapping[str, Held]) -> None:
        """Copy this rank's parts as they are now; ``tensors`` has the names and shapes that the snapshot was made for."""
        assert self._places.keys() <= tensors.keys()
        with torch.no_grad(), _one_thread():
            # In the order of `tensors`: parts that are read from a disk lie together there.
            for name, tensor in tensors.items():
                if name in self._places:
                    for place, (part, _) in zip(self._places[name], local_parts(tensor), strict=True):
                        place.copy_(part, non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.current_stream().synchronize()

    def release(self) -> None:
        """Unpin the buffer; the snapshot is of no use afterwards."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False


def owned_parts(tensors: Mapping[str, Held], rank: int, world: int) -> Iterator[tuple[str, list[Region]]]:
    """The name and boxes of each part that ``rank`` writes; over all ranks they cover each tensor exactly once.

    A plain tensor is the same on all ranks, a DTensor on the replicas of its mesh; each goes to the one that has least so far.
    A ``FlatPart`` is its rank's alone.
    """
    loads: dict[int, list[int]] = {}
    for name, tensor in sorted(tensors.items()):
        regions = local_regions(tensor)
        if isinstance(tensor, FlatPart):
            if regions:
                yield name, regions
            continue
        holder, holders = _place_among_holders(tensor, rank, world)
        load = loads.setdefault(holders, [0] * holders)
        owner = load.index(min(load))
        load[owner] += prod(tensor.shape) * tensor.element_size()
        if owner == holder and regions:
            yield name, regions


def _keyed(name: str, regions: Sequence[Region]) -> Iterator[tuple[str, Region]]:
    """Each box under a key of its own in the rank's file: the tensor's name, and ``#1``, ``#2`` behind it for further boxes."""
    for number, region in enumerate(regions):
        yield f"{name}#{number}" if number else name, region


def _place_among_holders(tensor: torch.Tensor, rank: int, world: int) -> tuple[int, int]:
    """Which of the ranks that hold the same part this one is, and how many they are."""
    if not isinstance(tensor, DTensor):
        return rank, world
    place, holders = 0, 1
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds no tensor"
    for axis, placement in enumerate(tensor.placements):
        assert not isinstance(placement, Partial), "a partial sum has no value yet"
        if placement.is_replicate():
            length = tensor.device_mesh.size(axis)
            place, holders = place * length + coordinate[axis], holders * length
    return place, holders


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch copies on one thread meanwhile.

    One core about fills the memory bus. Two threads, which meet at a barrier after each of hundreds of tensors, took 12 times
    as long as a memcpy where other processes used the cores too; one thread took 1.7 times as long there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pin(buffer: torch.Tensor) -> None:
    """Page-lock ``buffer`` where it lies; torch's own pinned allocator would round its size up to a power of two."""
    portable = 1
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), portable)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        raise TrainingError(
            f"cannot page-lock {buffer.numel()} bytes of host memory (CUDA error {int(error)})",
            hint="raise the limit of locked memory (ulimit -l), or take more ranks so that each holds less",
        )
