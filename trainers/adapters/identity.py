"""Which base an adapter was trained beside: digests of its files, kept with every checkpoint and export of an adapter.

An adapter fits any base of the same shapes and is right for one. A base may have hundreds of GB, so of a file of weights the
header and some blocks spread over it count: enough to tell any two trainings of a model apart. Of a folder that ``outgrow
export`` wrote, the manifest has the digests of all bytes, and those count.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import JsonDict, Record
from outgrow.errors import ModelError
from outgrow.recipes.placed import weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import NoAdapter
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.site import Site
from outgrow.storage import file_digest, fingerprint
from outgrow.trainers.models.weights import read_manifest, weight_file_names

BASE_FILE = "outgrow-base.json"
"""In an exported adapter: the ``BaseIdentity`` that it belongs to."""

CONFIG = "config.json"
_BLOCK = 1 << 16
_BLOCKS = 16
_LONGEST_HEADER = 100_000_000
"""That of safetensors itself."""


@dataclass(frozen=True, kw_only=True)
class BaseIdentity(Record):
    """A digest of each file of a base that decides what it computes, by name. No path: the same base may lie anywhere."""

    files: dict[str, str]

    @property
    def digest(self) -> str:
        return fingerprint(self.files)


def base_of(recipe: Recipe, site: Site) -> BaseIdentity | None:
    """The base of a recipe with an adapter; None where none is frozen, or where it follows from the recipe alone."""
    if isinstance(recipe.adapter, NoAdapter) or not isinstance(recipe.model, FolderModel):
        return None
    return folder_identity(weights_folder(site, recipe.model.path))


def folder_identity(folder: Path) -> BaseIdentity:
    """The identity of a folder of weights; reads a few MB of each of its files. ``ModelError`` as of ``FolderWeights``."""
    manifest = read_manifest(folder)
    names = [CONFIG, *weight_file_names(folder)]
    if manifest is not None and set(names) <= manifest.files.keys():
        return BaseIdentity(files={name: manifest.files[name] for name in names})
    return BaseIdentity(
        files={name: _sampled_digest(folder / name) if name != CONFIG else file_digest(folder / name) for name in names}
    )


def require_same_base(saved: JsonDict | None, now: BaseIdentity | None, where: str) -> None:
    """Nothing where a checkpoint or export ``where`` belongs to the base ``now``. Raises ``ModelError`` with both.

    ``saved`` is what it says of its base; None where that follows from its recipe.
    """
    held = BaseIdentity.from_dict(saved) if saved is not None else None
    if held == now:
        return
    files = _differing(held.files if held else {}, now.files if now else {})
    raise ModelError(
        f"the adapter was trained beside another base: beside {_short(held)}, and this one is {_short(now)}; "
        f"different: {', '.join(files)}",
        where=where,
        hint="let the name of the base in the site's sources lead to the one that the run began with, or start a new run",
    )


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _short(identity: BaseIdentity | None) -> str:
    return identity.digest[:16] if identity else "none that is a folder"


def _sampled_digest(path: Path) -> str:
    """sha256 over a safetensors file's size, header, and blocks at even distances from its first byte to its last."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        prefix = file.read(8)
        (header,) = struct.unpack("<Q", prefix.ljust(8, b"\0"))
        found.update(prefix + file.read(min(header, _LONGEST_HEADER)))
        if size <= _BLOCK * _BLOCKS:
            starts = [0]
            length = size
        else:
            starts = [(size - _BLOCK) * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
            length = _BLOCK
        for start in starts:
            file.seek(start)
            found.update(file.read(length))
    return found.hexdigest()
