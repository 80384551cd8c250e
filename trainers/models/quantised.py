"""A base in 4 bits as a ``TensorSource``: linear layers from a committed folder of packed weights, all else from its own files.

``quantised/<digest>/`` on the fast disk of a node holds the packed weights and their scales; the digest is of the base's files,
of which layers are packed, and how. A run that finds the folder checks every byte against its digest, each rank a part,
and quantises nothing. Otherwise, or where a byte differs, ``quantising`` makes it first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from outgrow.errors import DataError
from outgrow.recipes.placed import COPY_MARK, WEIGHTS, parse_record, record_key, weight_files
from outgrow.storage import digest, fingerprint
from outgrow.trainers.adapters.nf4 import (
    BLOCK,
    SCALES_BLOCK,
    Scales,
    dequantised,
    nested_code,
    packed_shape,
    quantised_layers,
    scale_counts,
)
from outgrow.trainers.checkpoint.tensor_file import Slot, lay_out
from outgrow.trainers.models.safetensors_file import SafetensorsFile
from outgrow.trainers.models.weights import FolderWeights, read_manifest
from outgrow.trainers.regions import Region

FORMAT = 1
"""Grows when the same base is to give other files."""
FILE_BYTES = 1 << 30
"""About the size of a file: ranks of a node make and check whole files."""
CODES, NESTED, OFFSET = ".codes", ".nested", ".offset"
"""Endings of the tensors of a file that hold a weight's ``Scales``."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a folder of packed weights holds: of which base, which weights (name -> shape), for which dtype that computes, and
    where they are quantised, as kernels of a GPU round otherwise."""

    base: str
    weights: Mapping[str, tuple[int, ...]]
    storage: torch.dtype
    device: str

    @classmethod
    def of(cls, folder: FolderWeights, model: nn.Module, device: torch.device) -> Self:
        """For the layers in 4 bits of ``model``, from a folder that has been checked against it."""
        layers = dict(quantised_layers(model))
        (storage,) = {layer.compute_dtype for layer in layers.values()}
        weights = {f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in layers.items()}
        return cls(base=base_version(folder), weights=weights, storage=storage, device=device.type)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says, beside the digests; equal on every node."""
        return {
            "format": FORMAT,
            "kind": "nf4",
            "base": self.base,
            "storage": str(self.storage).removeprefix("torch."),
            "device": self.device,
            "blocks": [BLOCK, SCALES_BLOCK],
            "scale_values": digest(nested_code().numpy().tobytes()),
        }

    @property
    def key(self) -> str:
        """The folder below a tier or cache."""
        shapes = {name: list(shape) for name, shape in self.weights.items()}
        return f"quantised/{fingerprint({**self.facts, 'weights': shapes})}"

    def files(self, file_bytes: int = FILE_BYTES) -> dict[str, list[str]]:
        """The weights of each file, in the order of the model, ``file_bytes`` or one weight a file; the same on every node."""
        groups, size = [list[str]()], 0
        for name, shape in self.weights.items():
            if groups[-1] and size + prod(shape) // 2 > file_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += prod(shape) // 2
        return {f"weights-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}

    def slots(self, names: Collection[str]) -> tuple[Slot, ...]:
        """Where the tensors of one file lie."""
        tensors = []
        for name in names:
            codes, nested = scale_counts(self.weights[name])
            tensors += [
                (name, self.storage, packed_shape(self.weights[name], self.storage)),
                (name + CODES, torch.uint8, (codes,)),
                (name + NESTED, torch.float32, (nested,)),
                (name + OFFSET, torch.float32, ()),
            ]
        return lay_out(tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.slots(self.weights.keys())[-1].stop if self.weights else 0


class QuantisedWeights:
    """``folder`` with the weights of ``scheme`` packed, from ``made``, whose bytes have been checked."""

    def __init__(self, folder: FolderWeights, scheme: Scheme, made: Path) -> None:
        self._folder = folder
        self._scheme = scheme
        self._files: dict[str, SafetensorsFile] = {}
        for file, names in scheme.files().items():
            self._files |= dict.fromkeys(names, SafetensorsFile(made / file))

    def names(self) -> Collection[str]:
        return self._folder.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name) if name in self._files else self._folder.shape(name)

    def read(self, name: str, region: Region) -> torch.Tensor:
        """A box of what ``shape`` says, a view that must not be written to."""
        return self._files.get(name, self._folder).read(name, region)

    def scales(self, weight: str) -> Scales:
        file = self._files[weight]
        codes, nested = file.shape(weight + CODES), file.shape(weight + NESTED)
        return Scales(
            codes=file.read(weight + CODES, Region((0,), codes)),
            nested=file.read(weight + NESTED, Region((0,), nested)),
            offset=file.read(weight + OFFSET, Region((), ())),
        )

    def dequantised(self, name: str, region: Region) -> torch.Tensor:
        """A box of the numbers that a layer computes with; of a weight that is not packed, what the folder has."""
        if name not in self._files:
            return self._folder.read(name, region)
        shape, storage = self._scheme.weights[name], self._scheme.storage
        first, stop = (row * shape[1] for row in (region.offset[0], region.offset[0] + region.shape[0]))
        # Whole blocks, each of which fills a whole number of stored elements.
        start, end = first // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, prod(shape))
        elements = 2 * storage.itemsize
        packed = self.read(name, Region((start // elements, 0), ((end - start) // elements, 1)))
        numbers = dequantised(packed, self._scales_of_blocks(name, start // BLOCK, -(-end // BLOCK)), end - start, storage)
        rows = numbers[first - start : stop - start].view(-1, shape[1])
        return rows[:, region.slices[1]]

    def _scales_of_blocks(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The scales float32 of some blocks, worked out from their codes."""
        scales = self.scales(name)
        return (
            nested_code()[scales.codes[start:stop].long()] * scales.nested[torch.arange(start, stop) // SCALES_BLOCK]
            + scales.offset
        )


def base_version(folder: FolderWeights) -> str:
    """Changes whenever a file of the base is written again; the same for a copy that outgrow made of it on another disk."""
    manifest = read_manifest(folder.folder)
    if manifest is not None:
        return fingerprint({name: manifest.files.get(name) for name in folder.files()})
    if (folder.folder / COPY_MARK).is_file() and folder.folder.parent.name == WEIGHTS:
        key = f"{WEIGHTS}/{folder.folder.name}"
        with suppress(OSError):
            record = parse_record((folder.folder.parent.parent / record_key(key)).read_bytes(), key)
            if record is not None:
                return record.digest
    try:
        return weight_files(folder.folder).version
    except DataError:  # a folder that is not to be copied may be read all the same
        stats = {name: (folder.folder / name).stat() for name in folder.files()}
        return fingerprint({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})
