"""How a base comes to lie in 4 bits on the fast disk of each node: found and checked, or made by the ranks of the node.

Weights are quantised one after the other, in parts, on the device of the run; a rank holds a part and the scales of one weight.
Files are written aside, in a folder that the leader holds locked, and renamed once all are there: a crash leaves nothing that
is trusted, and the next start clears it away. Ranks tell each other what they found or met, and go on or fail together.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from outgrow.errors import IntegrityError, OutgrowError, PlanError, TrainingError
from outgrow.recipes.schema.site import Site
from outgrow.storage import file_digest, nearest_folder, sync_folder
from outgrow.trainers.adapters.nf4 import BLOCK, quantise, quantise_scales
from outgrow.trainers.checkpoint.resume import gather_texts
from outgrow.trainers.checkpoint.tensor_file import Slot, encode_header
from outgrow.trainers.models.quantised import CODES, NESTED, OFFSET, QuantisedWeights, Scheme
from outgrow.trainers.models.weights import FolderWeights, row_parts
from outgrow.trainers.regions import Region

Gather: TypeAlias = Callable[[str], list[str]]
"""The texts of all ranks in rank order, on every rank."""

MANIFEST = "manifest.json"
_ASIDE = ".making-"
_PART = 1 << 22
"""About how many weights are quantised at a time; on a CPU bitsandbytes takes some 20 bytes for each meanwhile."""


def quantised_weights(
    folder: FolderWeights, model: nn.Module, site: Site, device: torch.device, gather: Gather = gather_texts
) -> QuantisedWeights:
    """``folder``, which fits the base of ``model``, with the layers that are in 4 bits in ``model`` packed. All ranks call it.

    Raises ``PlanError`` where the disk has no room, ``IntegrityError`` where nodes disagree or a number of the base is not
    finite, and ``TrainingError`` where another rank failed.
    """
    scheme = Scheme.of(folder, model, device)
    node = _Node.of(gather)
    places = [Path(tier.path) for tier in site.tiers if not tier.is_bucket] or [Path(site.cache).expanduser()]
    reserve_bytes = site.tiers[0].reserve_bytes if site.tiers else 0
    found = _find(scheme, places, node, gather)
    if not all(gather("found" if found.whole else "")):
        _make(_Maker(scheme, places[0], reserve_bytes, found.damaged), folder, device, node, gather, needed=not found.whole)
    made = found.whole or places[0] / scheme.key
    _require_equal(made, scheme, gather)
    return QuantisedWeights(folder, scheme, made)


@dataclass(frozen=True)
class _Node:
    """The ranks that share this rank's disks: which of them it is, and where they stand among all."""

    index: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, gather: Gather) -> _Node:
        here = json.dumps([socket.gethostname(), _boot(), uuid.uuid4().hex])
        told = gather(here)
        ranks = tuple(rank for rank, text in enumerate(told) if json.loads(text)[:2] == json.loads(here)[:2])
        return cls(ranks.index(told.index(here)), ranks)

    @property
    def leads(self) -> bool:
        return self.index == 0

    def share(self, names: list[str]) -> list[str]:
        """This rank's of the names that the node's ranks share out."""
        return names[self.index :: len(self.ranks)]

    def from_leader(self, told: list[str]) -> str:
        """What the node's leader said, of what all said."""
        return told[self.ranks[0]]

    def faults(self, told: list[str]) -> list[str]:
        """What the node's ranks said that is not empty."""
        return [told[rank] for rank in self.ranks if told[rank]]


@dataclass(frozen=True)
class _Found:
    """A node's folder of which every byte is right, None where there is none; and the inode of one on its fastest disk that is
    not, 0 where there is none."""

    whole: Path | None
    damaged: int


def _find(scheme: Scheme, places: list[Path], node: _Node, gather: Gather) -> _Found:
    """What of ``scheme`` lies on a node's disks. Every rank asks as often, whatever its node has."""
    whole: Path | None = None
    damaged = 0
    for place in places:
        folder = place / scheme.key
        inode = node.from_leader(gather(_inode(folder) if node.leads and whole is None else ""))
        faults = node.faults(gather(_fault(folder, scheme, node) if inode else ""))
        if inode and not faults:
            whole = folder
        elif inode and place == places[0]:
            damaged = int(inode)
    return _Found(whole, damaged)


def _inode(folder: Path) -> str:
    """What tells a folder from another that is put in its place; empty where there is none."""
    try:
        return str(folder.stat().st_ino)
    except OSError:
        return ""


def _fault(folder: Path, scheme: Scheme, node: _Node) -> str:
    """What is wrong with this rank's share of the files; empty where every byte is right."""
    from outgrow.streaming.manifest import FILES, read_manifest

    try:
        digests = read_manifest(folder, MANIFEST)[FILES]
        if set(digests) != set(scheme.files()):
            return "other files than the scheme has"
        wrong = [name for name in node.share(sorted(digests)) if file_digest(folder / name) != digests[name]]
    except (OSError, OutgrowError) as error:
        return str(error)
    return f"the bytes differ from their digest: {', '.join(wrong)}" if wrong else ""


def _make(maker: _Maker, folder: FolderWeights, device: torch.device, node: _Node, gather: Gather, *, needed: bool) -> None:
    """Make the folder by the ranks of each node where it is ``needed``; the others keep them company."""
    scheme = maker.scheme
    try:
        aside = node.from_leader(_together(gather, lambda: maker.begin() if needed and node.leads else ""))
        mine = node.share(sorted(scheme.files())) if needed else []
        told = _together(gather, lambda: json.dumps(_write_files(scheme, folder, Path(aside), mine, device)))
        digests = {file: value for rank in node.ranks for file, value in json.loads(told[rank]).items()}
        _together(gather, lambda: maker.commit(digests) if needed and node.leads else "")
    finally:
        maker.close()


def _together(gather: Gather, action: Callable[[], str]) -> list[str]:
    """What ``action`` returned on every rank. Where it failed on one, all fail: that one with its own error."""
    failure: Exception | None = None
    try:
        answer = action()
    except Exception as error:
        failure, answer = error, f"{type(error).__name__}: {error}"
    told = gather(json.dumps([failure is not None, answer]))
    if failure is not None:
        raise failure
    answers = [json.loads(text) for text in told]
    failed = [f"rank {rank}: {text}" for rank, (is_failure, text) in enumerate(answers) if is_failure]
    if failed:
        raise TrainingError(f"the base could not be quantised: {'; '.join(failed)}")
    return [text for _, text in answers]


class _Maker:
    """A folder aside that the leader of a node holds while its ranks fill it. ``damaged`` is the inode of what it replaces."""

    def __init__(self, scheme: Scheme, place: Path, reserve_bytes: int, damaged: int) -> None:
        self.scheme = scheme
        self._place = place
        self._target = place / scheme.key
        self._reserve_bytes = reserve_bytes
        self._damaged = damaged
        self._aside: Path | None = None

    def begin(self) -> str:
        """Clear what dead runs left, see that there is room, and make the folder; its path."""
        from outgrow.streaming.tiers.lease import LEASE, Holder, Lease, is_held, tier_lock

        above = self._target.parent
        above.mkdir(parents=True, exist_ok=True)
        with tier_lock(above) as now:
            for left in above.glob(f"{_ASIDE}*"):
                if not (left / LEASE).exists() or not is_held(left, now):
                    shutil.rmtree(left)
            if self._damaged and _inode(self._target) == str(self._damaged):
                shutil.rmtree(self._target)  # a run that reads it keeps its pages
            self._require_room()
            aside = above / f"{_ASIDE}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            aside.mkdir()
            Holder.here(self._target.name, self.scheme.num_bytes).write(aside)
            self._lease = Lease.take(aside)
        self._aside = aside
        return str(aside)

    def commit(self, digests: dict[str, str]) -> str:
        """Rename the folder into place, all its files made durable; nothing where another run was faster."""
        from outgrow.streaming.manifest import commit
        from outgrow.streaming.tiers.lease import LEASE, RECORD, tier_lock

        assert self._aside is not None
        with tier_lock(self._target.parent):
            self._lease.close()
            for name in (LEASE, RECORD):
                (self._aside / name).unlink()
            commit(self._aside, MANIFEST, self.scheme.facts, digests)
            if not self._target.exists():
                os.rename(self._aside, self._target)
                sync_folder(self._target.parent)
        return ""

    def close(self) -> None:
        """Take away what was not committed."""
        if self._aside is not None:
            self._lease.close()
            shutil.rmtree(self._aside, ignore_errors=True)

    def _require_room(self) -> None:
        free_bytes = shutil.disk_usage(nearest_folder(self._place)).free - self._reserve_bytes
        if self.scheme.num_bytes > free_bytes:
            raise PlanError(
                f"the weights in 4 bits take {self.scheme.num_bytes:,} bytes, and the disk has {max(free_bytes, 0):,} to give",
                where=str(self._place),
                hint="make room, or lower the reserve of the site's first tier, or put a larger disk first",
            )


def _write_files(scheme: Scheme, folder: FolderWeights, aside: Path, names: list[str], device: torch.device) -> dict[str, str]:
    """Write the files ``names`` and make them durable; the sha256 of each."""
    groups = scheme.files()
    for name in names:
        slots = scheme.slots(groups[name])
        header = encode_header(slots)
        with open(aside / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + slots[-1].stop)
            places = {slot.key: slot for slot in slots}
            for weight in groups[name]:
                for key, start, values in _quantised(folder, weight, scheme, device):
                    _put(file.fileno(), len(header), places[key], start, values)
            file.flush()
            os.fsync(file.fileno())
    return {name: file_digest(aside / name) for name in names}


def _quantised(
    folder: FolderWeights, name: str, scheme: Scheme, device: torch.device
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """One weight packed: (key of a tensor, first element, elements) of each part as it is made, and then of its scales."""
    shape, scales, done = scheme.weights[name], list[torch.Tensor](), 0
    for rows in _block_parts(shape):
        values = folder.read(name, rows).to(device)
        if values.dtype == torch.float64:
            values = values.float()
        # Not asked of the scales: kernels of GPUs pass over NaN as they look for the largest of a block.
        if not bool(values.isfinite().all()):
            raise IntegrityError(f"{name}: not all of its numbers are finite", where=str(folder.folder))
        packed, part_scales = quantise(values, scheme.storage)
        scales.append(part_scales.cpu())
        yield name, done, packed.cpu()
        done += packed.numel()
    quantised = quantise_scales(torch.cat(scales))
    yield name + CODES, 0, quantised.codes
    yield name + NESTED, 0, quantised.nested
    yield name + OFFSET, 0, quantised.offset


def _block_parts(shape: tuple[int, ...]) -> Iterator[Region]:
    """Boxes of whole rows that cover a matrix in order; each but the last holds a whole number of blocks."""
    step = BLOCK // gcd(BLOCK, shape[1])
    rows = max(1, _PART // prod(shape[1:]) // step) * step
    yield from row_parts(shape, rows * shape[1])


def _put(fd: int, data_start: int, slot: Slot, first: int, values: torch.Tensor) -> None:
    data = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    at = data_start + slot.start + first * slot.dtype.itemsize
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


def _boot() -> str:
    """What tells this boot of the kernel from any other, in a container too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _require_equal(made: Path, scheme: Scheme, gather: Gather) -> None:
    """Raise ``IntegrityError`` where two nodes hold other numbers of the same base: ranks would compute other models."""
    from outgrow.streaming.manifest import MARKER

    markers = gather((made / MARKER).read_text())
    others = [str(rank) for rank, marker in enumerate(markers) if marker != markers[0]]
    if others:
        raise IntegrityError(
            f"the base in 4 bits is another on ranks {', '.join(others)} than on rank 0",
            where=str(made),
            hint=f"remove {scheme.key} from the fast disk of one side; it is made again",
        )
