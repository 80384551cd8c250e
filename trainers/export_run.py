"""Exporting a run: its checkpoint, the model that its recipe makes, and the tokenizer of the very dataset it learned from.

Of a run with an adapter that is the adapter alone, or the model with the adapter worked in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from pydantic import ValidationError

from outgrow.contracts import CheckpointRef, ExportManifest, RunRef
from outgrow.errors import DataError, ModelError, RunError
from outgrow.recipes.placed import weights_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.site import Site
from outgrow.recipes.short_forms import expand
from outgrow.storage import Storage, verify_tree
from outgrow.trainers.adapters.folder import Beside, export_adapter
from outgrow.trainers.adapters.identity import base_of, require_same_base
from outgrow.trainers.adapters.lora import adapt
from outgrow.trainers.adapters.merge import MergedWeights
from outgrow.trainers.bring_up import base_weights
from outgrow.trainers.checkpoint.catalog import list_checkpoints
from outgrow.trainers.checkpoint.reader import CheckpointReader, open_checkpoint
from outgrow.trainers.export import ExportDtype, export
from outgrow.trainers.models.build import Vocabulary, config_for, folder_config, meta_model
from outgrow.trainers.models.weights import FolderWeights
from outgrow.trainers.regions import TensorSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MergeInto: TypeAlias = Literal["original", "4-bit"]

_KINDS: Mapping[MergeInto | None, str] = {None: "model", "original": "merged", "4-bit": "merged 4-bit"}
_DATASETS = "datasets"


def export_run(
    run: RunRef,
    site: Site,
    out: Path,
    *,
    step: int | None = None,
    dtype: ExportDtype | None = None,
    merge_into: MergeInto | None = None,
) -> ExportManifest:
    """The manifest of ``out``: the run's checkpoint of ``step`` (None: the newest) as a Hugging Face folder.

    Of a run with an adapter it is the adapter as a folder of peft's, or with ``merge_into`` the whole model: the adapter worked
    into the base as its folder has it (``original``), or as the run computed with it in 4 bits. ``dtype`` None: fp32 for an
    adapter alone, bf16 for what else the recipe computed in it, else fp32. A model that began with a folder needs that folder's
    ``config.json``, an adapter its weights too. Raises ``RunError`` without such a checkpoint and for a merge of what has no
    adapter, or of a recipe that this version does not take, ``DataError`` where its dataset is gone, ``ModelError`` for another
    base, ``IntegrityError`` for bytes that differ from their digest.
    """
    storage = site.open_storage()
    name = run.folder.rpartition("/")[2]
    ref = _checkpoint(storage, run, step)
    reader = open_checkpoint(storage, ref)
    recipe = _recipe_of(reader)
    store = _store(storage, str(reader.loader_state["index_fingerprint"]))
    with tempfile.TemporaryDirectory(prefix="outgrow-export-") as folder:
        vocabulary = _fetch_tokenizer(storage, store, Path(folder))
        config, tokenizer = config_for(recipe, site, vocabulary), Path(folder) / "tokenizer"
        if isinstance(recipe.adapter, Lora):
            require_same_base(reader.base, base_of(recipe, site), ref.folder)
            if merge_into is None:
                return export_adapter(
                    reader,
                    recipe.adapter,
                    _beside(recipe, site, config, reader),
                    tokenizer,
                    out,
                    dtype=dtype or "fp32",
                    run=name,
                    step=ref.step,
                    checkpoint_digest=ref.digest,
                )
        elif merge_into is not None:
            raise RunError(f"{name} trains all of its model: there is no adapter to merge", hint="export it without --merged")
        return export(
            reader if merge_into is None else _merged(reader, recipe, site, config, merge_into),
            config,
            tokenizer,
            out,
            dtype=dtype or ("bf16" if recipe.precision == "bf16" else "fp32"),
            run=name,
            step=ref.step,
            checkpoint_digest=ref.digest,
            kind=_KINDS[merge_into],
        )


def _beside(recipe: Recipe, site: Site, config: PretrainedConfig, reader: CheckpointReader) -> Beside:
    """The base that the adapter's folder is for. Raises ``ModelError`` where it is none that peft could load."""
    if not isinstance(recipe.model, FolderModel) or reader.base is None:
        raise ModelError(
            "the model beside the adapter was made from nothing, so there is no folder that peft could load first",
            where=reader.ref.folder,
            hint="outgrow export RUN FOLDER --merged",
        )
    folder = weights_folder(site, recipe.model.path)
    tokens = folder_config(folder).vocab_size
    if tokens < config.vocab_size:
        raise ModelError(
            f"the recipe gave the model {config.vocab_size} tokens, and the base has {tokens}: peft would load the adapter "
            "beside a smaller embedding",
            where=str(folder),
            hint="outgrow export RUN FOLDER --merged",
        )
    return Beside(model=meta_model(config, "fp32"), name=recipe.model.path, identity=reader.base)


def _merged(
    reader: CheckpointReader, recipe: Recipe, site: Site, config: PretrainedConfig, merge_into: MergeInto
) -> TensorSource:
    assert isinstance(recipe.adapter, Lora)
    names = [name for name, _ in meta_model(config, "fp32").named_parameters()]
    base = base_weights(recipe, site, config)
    if merge_into == "4-bit":
        if recipe.adapter.base != "nf4":
            raise RunError("the run kept its base as the folder has it, not in 4 bits", hint="--merge-into original")
        from outgrow.trainers.models.quantising import quantised_weights

        assert isinstance(base, FolderWeights), "combinations refuses 4 bits of weights that are drawn"
        model = meta_model(config, recipe.precision)
        adapt(model, recipe)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = quantised_weights(base, model, site, device)
    return MergedWeights(reader, base, recipe.adapter, names)


def _recipe_of(reader: CheckpointReader) -> Recipe:
    try:
        return Recipe.model_validate(expand(reader.recipe, Recipe))
    except ValidationError as error:
        keys = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise RunError(
            f"its recipe is one that this version of outgrow does not take: {keys}",
            where=reader.ref.folder,
            hint="export it with the version that trained it",
        ) from error


def _checkpoint(storage: Storage, run: RunRef, step: int | None) -> CheckpointRef:
    refs = list_checkpoints(storage, run.folder)
    for ref in refs:
        if step is None or ref.step == step:
            return ref
    known = ", ".join(str(ref.step) for ref in reversed(refs)) or "none"
    asked = "checkpoint" if step is None else f"checkpoint of step {step}"
    raise RunError(f"{run.folder} has no {asked}; committed steps: {known}")


def _store(storage: Storage, index_fingerprint: str) -> str:
    """The key of the token store that holds the row index of this fingerprint."""
    for name in storage.names(_DATASETS):
        if storage.exists(f"{_DATASETS}/{name}/rows-{index_fingerprint[:16]}"):
            return f"{_DATASETS}/{name}"
    raise DataError(
        f"the dataset that the run learned from (row index {index_fingerprint[:16]}) is not in {storage.root_url}, and with it "
        "its tokenizer",
        hint="outgrow data build RECIPE makes it again from the same sources",
    )


def _fetch_tokenizer(storage: Storage, store: str, folder: Path) -> Vocabulary:
    """The facts of a token store, whose tokenizer lies in ``folder``/tokenizer afterwards, each file checked."""
    from outgrow.streaming.manifest import FILES, MARKER, STORE_MANIFEST, read_manifest
    from outgrow.streaming.store import TOKENIZER, read_store

    for name in (STORE_MANIFEST, MARKER):
        storage.download(f"{store}/{name}", folder / name)
    digests = {
        key: value for key, value in read_manifest(folder, STORE_MANIFEST)[FILES].items() if key.startswith(f"{TOKENIZER}/")
    }
    for key in digests:
        storage.download(f"{store}/{key}", folder / key)
    verify_tree(folder, digests)
    return read_store(folder)
