"""An adapter as a folder that ``peft.PeftModel.from_pretrained(base, folder)`` loads: its matrices under peft's names, its
configuration, the tokenizer, the identity of the base that it belongs to, and a manifest of digests.

Modules that were trained whole lie beside the adapter, as what peft calls ``modules_to_save``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import nn

from outgrow.contracts import ExportManifest, JsonDict
from outgrow.errors import ModelError
from outgrow.recipes.schema.adapter import Lora
from outgrow.storage import Storage
from outgrow.trainers.adapters.identity import BASE_FILE
from outgrow.trainers.adapters.lora import ADAPTER_NAME, peft_config
from outgrow.trainers.adapters.merge import PREFIX
from outgrow.trainers.adapters.sources import MAGNITUDE, A, B
from outgrow.trainers.adapters.targets import Chosen, choose, within
from outgrow.trainers.export import DTYPES, ExportDtype, copy_tokenizer, existing, whole_tensor, write_folder
from outgrow.trainers.models.weights import tied_names
from outgrow.trainers.regions import Region, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """The base of an adapter: ``model`` without the adapter (meta will do), its ``name`` for people, and its identity."""

    model: PreTrainedModel
    name: str
    identity: JsonDict


def export_adapter(
    source: TensorSource,
    adapter: Lora,
    base: Beside,
    tokenizer: Path,
    out: Path,
    *,
    dtype: ExportDtype,
    run: str,
    step: int,
    checkpoint_digest: str,
) -> ExportManifest:
    """The manifest of ``out``, which holds the adapter in the checkpoint ``source``; arguments else as of ``export``.

    The same export again is verified and left as it is. Raises ``ModelError`` where peft could not load what was trained, and
    where ``out`` holds anything else.
    """
    wanted = ExportManifest(
        run=run, step=step, checkpoint_digest=checkpoint_digest, dtype=dtype, parameters=0, files={}, kind="adapter"
    )
    if out.exists():
        return existing(out, wanted)
    chosen = choose(base.model, adapter)
    whole = _outermost(chosen.whole)
    _refuse_tied(base.model, whole)
    names = _names(base.model, source, whole)
    count = sum(Region((), source.shape(name)).numel for name in names.values())

    def write(folder: Path) -> None:
        tensors = {key: whole_tensor(source, name).to(DTYPES[dtype]) for key, name in names.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = peft_config(adapter, _shortest(base.model, chosen), whole or None)
        config.target_modules = sorted(config.target_modules or ())  # peft makes a set of it, whose order changes
        config.base_model_name_or_path = base.name
        config.inference_mode = True
        config.save_pretrained(str(folder))
        Storage(str(folder)).write_json(BASE_FILE, base.identity)
        copy_tokenizer(tokenizer, folder)

    return write_folder(out, write, count * DTYPES[dtype].itemsize, dataclasses.replace(wanted, parameters=count))


def _names(model: nn.Module, source: TensorSource, whole: Iterable[str]) -> dict[str, str]:
    """For each tensor of peft's file, its name in the checkpoint. ``ModelError`` where the checkpoint has others."""
    parameters = dict(model.named_parameters())
    kept = {f"{_PEFT_PREFIX}{name}": PREFIX + name for name in parameters if within(name, whole)}
    held = [name for name in source.names() if name.startswith(PREFIX)]
    adapted = {_PEFT_PREFIX + _peft_name(name.removeprefix(PREFIX)): name for name in held if name.endswith((A, B, MAGNITUDE))}
    missing, extra = set(kept.values()) - set(held), set(held) - set(kept.values()) - set(adapted.values())
    if missing or extra:
        raise ModelError(f"the checkpoint is not of this adapter: {', '.join(sorted(missing | extra)[:8])}")
    return dict(sorted((adapted | kept).items()))


def _peft_name(name: str) -> str:
    """peft's files name no adapter, and a magnitude as it was called before it had a module of its own."""
    return name.replace(f".{ADAPTER_NAME}.", ".").replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _shortest(model: nn.Module, chosen: Chosen) -> list[str]:
    """Last parts of names where they stand for exactly the modules that were chosen, else full names.

    peft takes every module whose name ends so; other programs that read adapters know the short ones alone.
    """
    short = {name.rpartition(".")[2] for name in chosen.adapted}
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in short]
    return sorted(short) if found == list(chosen.adapted) else list(chosen.adapted)


def _outermost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in sorted(names):
        if not within(name, kept):
            kept.append(name)
    return kept


def _refuse_tied(model: PreTrainedModel, whole: Iterable[str]) -> None:
    tied: Mapping[str, str] = tied_names(model)
    both = sorted({name for pair in tied.items() for name in pair if within(name, whole)})
    if both:
        raise ModelError(
            f"{', '.join(both)}: trained whole, and one matrix for embedding and head; peft would load a copy for one of them, "
            "which is another model",
            where="adapter.fully_trained",
            hint="outgrow export RUN FOLDER --merged",
        )
