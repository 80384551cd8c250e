"""From a checkpoint to a Hugging Face folder: sharded safetensors, configuration, tokenizer, and a manifest of digests.

Tensors are read one by one from any ``TensorSource``, so memory holds one shard whatever the size of the model or the number of
ranks that trained it. The folder is written aside, made durable and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from safetensors.torch import save_file

from outgrow.contracts import ExportManifest
from outgrow.errors import ModelError, PlanError
from outgrow.storage import Storage, nearest_folder, sync_folder, sync_tree, tree_digests, verify_tree
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.custom import PREFIX as CUSTOM_PREFIX
from outgrow.trainers.models.custom import is_custom
from outgrow.trainers.models.weights import INDEX_FILE, MANIFEST_FILE, SINGLE_FILE, read_manifest
from outgrow.trainers.regions import Region, TensorSource
from outgrow.trainers.scratch import claimed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ExportDtype: TypeAlias = Literal["fp32", "bf16"]
DTYPES: Mapping[ExportDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 2_000_000_000
CUSTOM_FILE = "model.json"


def export(
    source: TensorSource,
    config: PretrainedConfig,
    tokenizer: Path,
    out: Path,
    *,
    dtype: ExportDtype,
    run: str,
    step: int,
    checkpoint_digest: str,
    prefix: str = "model/",
    kind: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> ExportManifest:
    """The manifest of ``out``, which holds the parameters ``<prefix><name>`` of ``source`` and loads in transformers.

    ``tokenizer`` is a folder of nothing but the tokenizer's files. The same export again is verified and left as it is. Raises
    ``ModelError`` where ``out`` holds anything else or ``source`` is not of this model, ``PlanError`` where the disk has
    no room.
    """
    wanted = ExportManifest(
        run=run, step=step, checkpoint_digest=checkpoint_digest, dtype=dtype, parameters=0, files={}, kind=kind
    )
    if out.exists():
        return existing(out, wanted)
    model = meta_model(config, "fp32")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check_source(source, prefix, shapes)
    sizes = {name: Region((), shape).numel * DTYPES[dtype].itemsize for name, shape in shapes.items()}

    def write(folder: Path) -> None:
        _write_weights(folder, source, prefix, plan_shards(sizes, shard_bytes), sizes, DTYPES[dtype])
        _write_config(folder, config, type(model).__name__, DTYPES[dtype])
        copy_tokenizer(tokenizer, folder)

    parameters = sum(Region((), shape).numel for shape in shapes.values())
    return write_folder(out, write, sum(sizes.values()), dataclasses.replace(wanted, parameters=parameters))


def write_folder(out: Path, write: Callable[[Path], None], num_bytes: int, manifest: ExportManifest) -> ExportManifest:
    """``manifest`` with the digests of what ``write`` has put into ``out``, which is there whole, with its manifest, or not.

    Raises ``PlanError`` where the disk has no room for ``num_bytes``.
    """
    with claimed(out.parent, f".{out.name}.tmp") as aside:  # an export that was killed has left its room to this one
        _check_room(out, num_bytes)
        write(aside)
        manifest = dataclasses.replace(manifest, files=tree_digests(aside))
        Storage(str(aside)).write_json(MANIFEST_FILE, manifest.to_dict())
        sync_tree(aside)
        os.rename(aside, out)
        sync_folder(out.parent)
    return manifest


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into lists of at most ``shard_bytes``; a tensor that is larger has a list of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def existing(out: Path, wanted: ExportManifest) -> ExportManifest:
    """The manifest of ``out`` where it is the export ``wanted``, whole. Raises ``ModelError`` where it is anything else."""
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None or dataclasses.replace(manifest, parameters=wanted.parameters, files=wanted.files) != wanted:
        raise ModelError("there is something else here already", where=str(out), hint="choose another folder")
    verify_tree(out, manifest.files)
    return manifest


def _check_source(source: TensorSource, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    held = {name.removeprefix(prefix) for name in source.names() if name.startswith(prefix)}
    problems = [f"missing: {name}" for name in shapes if name not in held]
    problems += [f"extra: {name}" for name in sorted(held - shapes.keys())]
    problems += [
        f"misshapen: {name} is {list(source.shape(prefix + name))}, the model's is {list(shape)}"
        for name, shape in shapes.items()
        if name in held and source.shape(prefix + name) != shape
    ]
    if problems:
        raise ModelError("the checkpoint is not of this model\n" + "\n".join(problems))


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(nearest_folder(out.parent)).free
    if needed > free:
        raise PlanError(
            f"the export takes {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
            where=str(out),
            hint="free some space, or choose a folder on another disk",
        )


def _write_weights(
    folder: Path,
    source: TensorSource,
    prefix: str,
    shards: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> None:
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name.removeprefix(CUSTOM_PREFIX): whole_tensor(source, prefix + name).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        Storage(str(folder)).write_json(INDEX_FILE, index)


def whole_tensor(source: TensorSource, name: str) -> torch.Tensor:
    """All of ``name``, without gaps in memory."""
    shape = source.shape(name)
    return source.read(name, Region.whole(shape)).contiguous()


def _write_config(folder: Path, config: PretrainedConfig, architecture: str, dtype: torch.dtype) -> None:
    """``config.json`` and ``generation_config.json``; the cache, off in training, is on again.

    A custom model has none of the two: ``model.json`` names its factory, as the recipe does.
    """
    if is_custom(config):
        Storage(str(folder)).write_json(CUSTOM_FILE, {**config.outgrow_model, "vocab_size": config.vocab_size})
        return
    from transformers import GenerationConfig

    written = copy.deepcopy(config)
    written.architectures = [architecture]
    written.dtype = dtype
    written.use_cache = True
    written.name_or_path = ""  # else the folder that training began with, on this machine, is written down
    written.save_pretrained(folder)
    GenerationConfig.from_model_config(written).save_pretrained(folder)


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Put the files of ``tokenizer`` into ``folder``. Raises ``ModelError`` for what is no tokenizer's."""
    if not (tokenizer / "tokenizer.json").is_file():
        raise ModelError("no tokenizer.json here", where=str(tokenizer))
    for path in sorted(tokenizer.iterdir()):
        if (folder / path.name).exists() or not path.is_file():
            raise ModelError(f"{path.name} is no file of a tokenizer", where=str(tokenizer))
        shutil.copyfile(path, folder / path.name)
