"""A Hugging Face folder of safetensors as a ``TensorSource``: just the slice asked for is read, and nothing is ever unpickled.

Files are mapped into memory, so a rank's memory grows by what it copies out alone. A folder that ``outgrow export`` wrote has a
manifest: each of its files is checked against its digest before the first byte of it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from outgrow.contracts import ExportManifest
from outgrow.errors import IntegrityError, ModelError
from outgrow.storage import file_digest
from outgrow.trainers.models.safetensors_file import SafetensorsFile
from outgrow.trainers.regions import Region

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "outgrow-export.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors that older versions of transformers wrote and every version works out anew."""

_COMPARED_ELEMENTS = 1 << 24


class FolderWeights:
    """The tensors of a folder under their names in it, on the CPU, in the file's dtype."""

    def __init__(self, folder: Path) -> None:
        """Open every file's header. Raises ``ModelError`` for a folder without safetensors, or with broken or missing files."""
        self.folder = folder
        self._digests = manifest.files if (manifest := read_manifest(folder)) is not None else {}
        self._verified: set[str] = set()
        self._files: dict[str, str] = _files_of_names(folder)
        self._open = {name: SafetensorsFile(folder / name) for name in sorted(set(self._files.values()))}
        lost = sorted(name for name, file in self._files.items() if name not in self._open[file].entries)
        if lost:
            raise ModelError(f"{INDEX_FILE} names tensors that its files lack: {_listed(lost)}", where=str(folder))

    def names(self) -> Collection[str]:
        return self._files.keys()

    def files(self) -> Collection[str]:
        """The names of the files of weights, sorted."""
        return self._open.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._open[self._files[name]].shape(name)

    def read(self, name: str, region: Region) -> torch.Tensor:
        """The values of ``region``, a view of the file that must not be written to.

        Raises ``IntegrityError`` where the file differs from the manifest's digest.
        """
        self._verify(self._files[name])
        return self._open[self._files[name]].read(name, region)

    def check(self, model: PreTrainedModel, *, values: bool = True) -> None:
        """Raise one ``ModelError`` with every tensor that is missing, extra, misshapen or not of floats, and every untied head.

        A tensor that the model ties to another may be absent, or present and equal to it, which is read only where ``values``
        are to be. ``model`` may be on meta.
        """
        parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        aliases = tied_names(model)
        problems = [f"missing: {name} {list(shape)}" for name, shape in parameters.items() if name not in self._files]
        for name in sorted(self._files):
            expected = parameters.get(aliases.get(name, name))
            if expected is None:
                if not _ignorable(name, model):
                    problems.append(f"extra: {name} {list(self.shape(name))}")
            elif self.shape(name) != expected:
                problems.append(f"misshapen: {name} is {list(self.shape(name))}, the model's is {list(expected)}")
            elif (dtype := self._open[self._files[name]].entries[name].dtype) not in _FLOATS:
                problems.append(f"not of floats: {name} is {dtype}")
            elif values and name in aliases and aliases[name] in self._files and not self._equal(name, aliases[name]):
                problems.append(
                    f"not tied: {name} differs from {aliases[name]}, which config.json (tie_word_embeddings) says it is"
                )
        if problems:
            raise ModelError(
                "the weights do not fit the model\n" + "\n".join(problems),
                where=str(self.folder),
                hint="config.json, or the files beside it, are of another model",
            )

    def _equal(self, one: str, other: str) -> bool:
        return all(torch.equal(self.read(one, part), self.read(other, part)) for part in row_parts(self.shape(one)))

    def _verify(self, file: str) -> None:
        if not self._digests or file in self._verified:
            return
        path = self.folder / file
        if file not in self._digests:
            raise IntegrityError(f"{MANIFEST_FILE} does not name this file", where=str(path))
        if file_digest(path) != self._digests[file]:
            raise IntegrityError("the bytes differ from their digest", where=str(path))
        self._verified.add(file)


def read_manifest(folder: Path) -> ExportManifest | None:
    """The manifest of a folder that ``outgrow export`` wrote; None for any other folder."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        return ExportManifest.from_dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"not an export manifest: {error}", where=str(path)) from error


def weight_file_names(folder: Path) -> list[str]:
    """The names of a folder's files of weights, sorted. Raises ``ModelError`` where there are none, or some are missing."""
    return sorted(set(_files_of_names(folder).values()))


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """For each further name of a parameter that has several, the name that ``named_parameters`` gives it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first[id(parameter)] != name
    }


def row_parts(shape: tuple[int, ...], elements: int = _COMPARED_ELEMENTS) -> Iterator[Region]:
    """Boxes of whole rows (first dimension) that cover a tensor in order, each of at most ``elements``, or one row."""
    if not shape:
        yield Region((), ())
        return
    row = Region((), shape[1:]).numel
    rows = max(1, elements // max(1, row))
    for start in range(0, shape[0], rows):
        yield Region((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))


def _files_of_names(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index or the one file's own header."""
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(SafetensorsFile(folder / SINGLE_FILE).entries, SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES) if folder.is_dir() else []
        if pickles:
            raise ModelError(
                f"weights in pickle files ({_listed(pickles)}), which can run code and are never read",
                where=str(folder),
                hint="save the model again with save_pretrained(..., safe_serialization=True)",
            )
        raise ModelError(f"no weights here: neither {SINGLE_FILE} nor {INDEX_FILE}", where=str(folder))
    try:
        files: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"not an index of safetensors: {error}", where=str(index)) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"'{name}' is not the name of a safetensors file in this folder", where=str(index))
        if not (folder / name).is_file():
            raise ModelError(f"{name} is missing", where=str(index), hint="fetch the folder again; it is not whole")
    return files


def _ignorable(name: str, model: PreTrainedModel) -> bool:
    patterns: list[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return bool(_DERIVED.search(name)) or any(re.search(pattern, name) for pattern in patterns)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
