"""Small datasets, checkpoints, weights and quantised caches in the places of a site, for tests of whole copies."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from safetensors.numpy import save_file
from token_stores import documents, make_dataset

from outgrow.cli.data_place import checkpoint_contents
from outgrow.recipes.placed import COPY_MARK
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, digest, tree_digests
from outgrow.streaming import manifest
from outgrow.streaming.tiers.placement import Copy, Item, plan_copies, wanted_copies
from outgrow.streaming.tiers.places import open_places
from outgrow.streaming.tiers.placing import Outcome, Placer
from outgrow.streaming.tiers.stock import Shelves, Stock
from outgrow.trainers.checkpoint.catalog import marker_of
from outgrow.trainers.checkpoint.format import MANIFEST, MARKER, FileEntry, Manifest, step_folder

STORE = "datasets/s"
WEIGHTS = "weights/llama"
QUANTISED = "quantised/q4"
RUN = "runs/tiny-0123"
STEP = step_folder(RUN, 7)


@dataclass(frozen=True)
class Kept:
    """A site over folders below ``root``, opened."""

    root: Path
    site: Site

    @property
    def shelves(self) -> Shelves:
        return Shelves(self.site, open_places(self.site), checkpoint_contents)

    def placer(self, **options: Any) -> Placer:
        return Placer(self.shelves, locks=self.root / "locks", **options)

    def stock(self, *, read: bool = False) -> Stock:
        return self.shelves.stock(read=read)

    def item(self, key: str, *, read: bool = False) -> Item:
        return next(item for item in self.stock(read=read).items if item.key == key)

    def plan(self, wanted: Sequence[tuple[str, str]] = (), *, read: bool = False) -> list[Copy]:
        """What is missing of the given (key, place), or of what the site wants."""
        stock = self.stock(read=read)
        pairs = [(item, target) for key, target in wanted for item in stock.items if item.key == key]
        speeds = {place.name: place.tier.bytes_per_s for place in self.shelves.places}
        return plan_copies(stock.items, pairs or wanted_copies(stock.items, self.site.place), stock.rooms, speeds)

    def apply(self, wanted: Sequence[tuple[str, str]] = (), *, read: bool = False, **options: Any) -> list[Outcome]:
        """The outcomes of all that is missing and not refused."""
        placer = self.placer(**options)
        return [placer.place(copy) for copy in self.plan(wanted, read=read) if not copy.refusal]

    def remove(self, key: str, place: str) -> None:
        self.placer().remove(self.item(key).kind, key, place)

    def folder(self, place: str, key: str) -> Path:
        return self.root / place / key

    def state(self, key: str, place: str, *, read: bool = False) -> str:
        """``original``, ``copy``, its problem, or empty where it does not lie there."""
        holding = self.item(key, read=read).at(place)
        return "" if holding is None else holding.problem or ("copy" if holding.copied else "original")


def make_site(
    root: Path, *, place: dict[str, list[str]] | None = None, sources: dict[str, str] | None = None, **tiers: Any
) -> Kept:
    """A site with its storage in ``root/storage`` and tiers ``fast`` and ``slow``; ``tiers`` has keys of ``slow``, or as
    ``tiers`` another list of them."""
    given = tiers.pop("tiers", None) or [
        {"name": "fast", "path": str(root / "fast"), "reserve": "0 B"},
        {"name": "slow", "path": str(root / "slow"), "reserve": "0 B", **tiers},
    ]
    named = sources if sources is not None else {"llama": str(root / "models/llama")}
    data = {
        "storage": str(root / "storage"),
        "cache": str(root / "cache"),
        "tiers": given,
        "sources": named,
        "place": place or {},
    }
    return Kept(root, Site.model_validate({"schema": 1, **data}))


def write_all(root: Path, seed: int = 1) -> None:
    """One folder of each kind: in ``root/storage``, the weights in ``root/models/llama``."""
    write_dataset(root / "storage")
    write_checkpoint(Storage(str(root / "storage")), 7, seed)
    write_weights(root / "models/llama", seed)
    write_quantised(root / "storage", seed)


def write_dataset(root: Path) -> None:
    make_dataset(root, {"a": (documents(1, 40), documents(2, 5))})


def write_checkpoint(storage: Storage, step: int, seed: int, chunk_bytes: int = 1000) -> str:
    folder, rng = step_folder(RUN, step), random.Random(seed + step)
    files = {}
    for name, size in (("rank-00000.safetensors", 3500), ("loader.json", 100), ("empty.json", 0)):
        data = rng.randbytes(size)
        storage.write(f"{folder}/{name}", data)
        chunks = tuple(digest(data[start : start + chunk_bytes]) for start in range(0, size, chunk_bytes))
        files[name] = FileEntry(size=size, chunks=chunks)
    made = Manifest(step=step, world=1, attempt="a", saved=0.0, metrics={}, chunk_bytes=chunk_bytes, files=files).to_bytes()
    storage.write(f"{folder}/{MANIFEST}", made)
    storage.write(f"{folder}/{MARKER}", marker_of(made))
    return folder


def write_weights(folder: Path, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save_file({f"w{number}": rng.random((20, 20), np.float32)}, folder / name)
    weight_map = {f"w{number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"model": {}}')


def write_quantised(root: Path, seed: int) -> None:
    folder = root / QUANTISED
    folder.mkdir(parents=True)
    (folder / "layers").mkdir()
    (folder / "layers/0.safetensors").write_bytes(random.Random(seed).randbytes(2000))
    manifest.commit(folder, "manifest.json", {"bits": 4})


@contextmanager
def without_waiting_for_disks() -> Iterator[None]:
    """What is lost when the power goes cannot be seen in a test, and costs most of its time."""
    with patch.object(os, "fsync", lambda fd: None), patch.object(os, "fdatasync", lambda fd: None):
        yield


def copied_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a copy, without the mark that it is one."""
    return {name: value for name, value in tree_digests(folder).items() if Path(name).name != COPY_MARK}


def originals(root: Path) -> dict[str, str]:
    """sha256 of every file of the originals."""
    return {f"{top}/{name}": value for top in ("storage", "models") for name, value in tree_digests(root / top).items()}


def flip(path: Path, at: int = -1) -> None:
    """Change one byte of a file; its size and time stay."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
