"""Exporting a run: its checkpoint, the model that its recipe makes, and the tokenizer of the very dataset it learned from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from outgrow.contracts import CheckpointRef, ExportManifest, RunRef
from outgrow.errors import DataError, RunError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.recipes.short_forms import expand
from outgrow.storage import Storage, verify_tree
from outgrow.trainers.checkpoint.catalog import list_checkpoints
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.export import ExportDtype, export
from outgrow.trainers.models.build import Vocabulary, config_for

_DATASETS = "datasets"


def export_run(
    run: RunRef, site: Site, out: Path, *, step: int | None = None, dtype: ExportDtype | None = None
) -> ExportManifest:
    """The manifest of ``out``: the run's checkpoint of ``step`` (None: the newest) as a Hugging Face folder.

    ``dtype`` None: bf16 where the recipe computes in it, else fp32. A model that began with a folder needs that folder's
    ``config.json``. Raises ``RunError`` without such a checkpoint, ``DataError`` where its dataset is gone, ``IntegrityError``
    for bytes that differ from their digest.
    """
    storage = site.open_storage()
    ref = _checkpoint(storage, run, step)
    reader = open_checkpoint(storage, ref)
    recipe = Recipe.model_validate(expand(reader.recipe, Recipe))
    store = _store(storage, str(reader.loader_state["index_fingerprint"]))
    with tempfile.TemporaryDirectory(prefix="outgrow-export-") as folder:
        vocabulary = _fetch_tokenizer(storage, store, Path(folder))
        return export(
            reader,
            config_for(recipe, site, vocabulary),
            Path(folder) / "tokenizer",
            out,
            dtype=dtype or ("bf16" if recipe.precision == "bf16" else "fp32"),
            run=run.folder.rpartition("/")[2],
            step=ref.step,
            checkpoint_digest=ref.digest,
        )


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
