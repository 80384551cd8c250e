"""Whole copies that outgrow made: what is written beside each, and the folder that the weights of a name are read from.

A copy ``<tier>/<key>`` has a record ``<tier>/placed/<key with +>.json`` and in itself the file ``.outgrow-copy``. What lacks
either is an original: nothing here or in ``streaming.tiers`` deletes or changes it. While a copy is made or repaired there is
also a claim ``<tier>/placing/<key with +>.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from outgrow.contracts import Record
from outgrow.errors import DataError
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.tiers import Tier
from outgrow.storage import Storage, fingerprint

Kind: TypeAlias = Literal["datasets", "weights", "quantised", "checkpoints"]
"""What can lie on several tiers; the keys of ``place:`` in a site."""

PLACED = "placed"
"""Folder of a tier with the records of the copies on it."""
PLACING = "placing"
"""Folder of a tier with the claims of copies that were begun and, on a disk, their files."""
COPY_MARK = ".outgrow-copy"
"""File in a copy, so that a folder that somebody puts in its place is not taken for one."""
WEIGHTS = "weights"
"""Folder of a tier with copies of weights, each under the name that ``sources`` gives it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True, kw_only=True)
class PlacedFile(Record):
    """A file of a copy that no manifest vouches for, with what was read while it was copied."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Placed(Record):
    """A copy that outgrow made of ``key``.

    ``source`` is where it came from, for people; of weights, the original's folder. ``digest`` is that of the manifest, or the
    version of weights (``WeightFiles.version``). ``time`` is Unix seconds. ``files`` is empty where a manifest has the digests.
    """

    key: str
    kind: Kind
    bytes: int
    source: str
    digest: str
    time: float
    files: dict[str, PlacedFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files of a folder of weights that are copied, by name, links followed, and the names of those that are not."""

    files: Mapping[str, Path]
    left_out: tuple[str, ...]

    @property
    def version(self) -> str:
        """Changes when a file comes, goes or is written again."""
        stats = {name: path.stat() for name, path in self.files.items()}
        return fingerprint({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})


def is_name(name: str) -> bool:
    """Whether ``name`` may be a part of a key: it means the same to every file system, and nothing to a shell."""
    return _NAME.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether ``name`` is that of a file, without a folder in it."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def flat(key: str) -> str:
    """The key as one name; no two keys have the same, as no part of a key holds a ``+``."""
    return key.replace("/", "+")


def record_key(key: str) -> str:
    """Where a place keeps the record of its copy of ``key``."""
    return f"{PLACED}/{flat(key)}.json"


def claim_key(key: str) -> str:
    """Where a place keeps what was said of its copy of ``key`` when that was begun, until it is finished."""
    return f"{PLACING}/{flat(key)}.json"


def parse_record(data: bytes, key: str) -> Placed | None:
    """The record of a copy of ``key``; None where the bytes are none."""
    try:
        record = Placed.from_dict(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if record.key == key else None


def read_record(storage: Storage, at: str, key: str) -> Placed | None:
    """The record of a copy of ``key`` that lies at ``at``; None where there is none."""
    try:
        return parse_record(storage.read(at), key)
    except FileNotFoundError:
        return None


def read_records(storage: Storage, folder: str) -> Iterator[Placed]:
    """Every record in a place's folder ``PLACED`` or ``PLACING``; what is none is passed over."""
    for name in storage.names(folder):
        key = name.removesuffix(".json").replace("+", "/")
        if name.endswith(".json") and all(map(is_name, key.split("/"))):
            record = read_record(storage, f"{folder}/{name}", key)
            if record is not None:
                yield record


def weight_files(folder: Path) -> WeightFiles:
    """What is copied of a folder of weights: its own files, but no pickles; neither hidden files nor folders.

    A link is followed where it stays in the folder, or leads from a snapshot of a Hugging Face cache to that model's blobs.
    Raises ``DataError`` that names the others, and a file that the index of the safetensors names and the folder lacks.
    """
    files, left_out, astray = dict[str, Path](), list[str](), list[str]()
    roots = _roots(folder)
    for path in sorted(folder.iterdir()):
        real = path.resolve()
        if path.name.startswith(".") or path.is_dir() or path.suffix in _PICKLES:
            left_out.append(path.name)
        elif not is_file_name(path.name) or not real.is_file() or not any(real.is_relative_to(root) for root in roots):
            astray.append(path.name)
        else:
            files[path.name] = real
    if astray:
        raise DataError(
            f"not a plain file of this folder: {', '.join(map(ascii, astray))}",
            where=str(folder),
            hint="a link may lead to a file of the same folder, or to the blobs of its Hugging Face cache",
        )
    lost = [name for name in _indexed(files) if name not in files]
    if lost:
        raise DataError(f"the index of the weights names files that are not there: {', '.join(lost)}", where=str(folder))
    return WeightFiles(files=files, left_out=tuple(left_out))


def is_weights(folder: Path) -> bool:
    """Whether a folder holds weights as safetensors, with their configuration."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def weights_folder(site: Site, name: str) -> Path:
    """The folder to read the weights or tokenizer of ``name`` from: of those on local disks, the fastest whole copy of what
    ``site.locate`` gives, or that folder itself.

    A copy counts where its record says that it is of this folder as it is now, and every file has its size. Where the original
    is not there, as on a disk that is unplugged, any copy of it does. An original on no tier is taken to be slower than the
    first tier and faster than the others. Raises ``SiteError`` where the site does not know the name.
    """
    original = Path(site.locate(name))
    if is_name(name):
        for tier in _tiers_before(site, original):
            folder = Path(tier.path) / WEIGHTS / name
            if folder != original and _is_copy(Path(tier.path), f"{WEIGHTS}/{name}", original):
                return folder
    return original


def _tiers_before(site: Site, original: Path) -> Iterator[Tier]:
    """The local tiers whose copies are read rather than ``original``."""
    for number, tier in enumerate(site.tiers):
        if not tier.is_bucket:
            if original.exists() and (original.is_relative_to(tier.path) or number > 0 and not _on_a_tier(site, original)):
                return
            yield tier


def _on_a_tier(site: Site, folder: Path) -> bool:
    return any(not tier.is_bucket and folder.is_relative_to(tier.path) for tier in site.tiers)


def _is_copy(tier: Path, key: str, original: Path) -> bool:
    """Whether ``key`` on a tier is a copy of ``original`` as that is now, by record and sizes."""
    try:
        record = parse_record((tier / record_key(key)).read_bytes(), key)
        if record is None or record.source != str(original) or (tier / claim_key(key)).exists():
            return False
        sizes = {name: os.stat(tier / key / name, follow_symlinks=False).st_size for name in record.files if is_file_name(name)}
        whole = sizes == {name: file.num_bytes for name, file in record.files.items()}
        return whole and (not original.exists() or weight_files(original).version == record.digest)
    except (OSError, DataError):
        return False


def _roots(folder: Path) -> list[Path]:
    """The folders that a link in ``folder`` may lead into."""
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots"
    return [real, real.parent.parent / "blobs"] if is_snapshot else [real]


def _indexed(files: Mapping[str, Path]) -> list[str]:
    """The names of files in every index of sharded safetensors."""
    names = set[str]()
    for name, path in files.items():
        if name.endswith(".safetensors.index.json"):
            try:
                names |= {str(file) for file in json.loads(path.read_bytes())["weight_map"].values()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f"not an index of safetensors: {error}", where=str(path)) from None
    return sorted(names)
