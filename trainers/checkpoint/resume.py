"""Loads the newest checkpoint that is whole; all ranks take the same one, or all fall back together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from outgrow.contracts import CheckpointRef
from outgrow.errors import IntegrityError, RunError
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import Refused, survey
from outgrow.trainers.checkpoint.reader import CheckpointReader, open_checkpoint


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from: ``reader`` None where nothing was saved yet; ``refused`` what was newer but not whole."""

    reader: CheckpointReader | None
    refused: tuple[Refused, ...]


def gather_texts(text: str) -> list[str]:
    """The texts of all ranks in rank order: a collective of the default group, or the one text where there is no group."""
    if not dist.is_initialized():
        return [text]
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def resume(
    storage: Storage,
    run_folder: str,
    load: Callable[[CheckpointReader], None],
    gather: Callable[[str], list[str]] = gather_texts,
) -> Resumed:
    """The newest checkpoint that ``load`` could read on every rank; every rank must call this.

    A rank verifies just what it reads, so one rank may find a fault that no other sees: they tell each other after each try,
    and all go on to the one before. ``load`` must do no collective and may be called again after it failed half-way. What is
    refused stays on the disk. Raises ``IntegrityError`` where checkpoints were committed and none loads: a run never starts
    over in silence; ``RunError`` where ranks see different storage.
    """
    found = survey(storage, run_folder)
    refs = [saved.ref for saved in found.saved]
    common = _seen_by_all(run_folder, refs, gather)
    refused = [*found.refused, *(Refused(ref.folder, "not whole on every rank") for ref in refs if ref not in common)]
    for ref in common:
        reader, fault = _try(storage, ref, load)
        faults = [f"rank {rank}: {text}" for rank, text in enumerate(gather(fault)) if text]
        if not faults and reader:
            return Resumed(reader, tuple(refused))
        refused.append(Refused(ref.folder, "\n".join(faults)))
    if refused:
        listing = "\n".join(f"{r.folder}: {r.reason}" for r in refused)
        raise IntegrityError(
            f"none of the committed checkpoints is whole:\n{listing}",
            where=run_folder,
            hint="put back the files from a copy, or start a new run; the old folder is left as it is",
        )
    return Resumed(None, ())


def _try(storage: Storage, ref: CheckpointRef, load: Callable[[CheckpointReader], None]) -> tuple[CheckpointReader | None, str]:
    try:
        reader = open_checkpoint(storage, ref)
        # Small and verified in any case, so that a fault in them is found here and not after the choice is made.
        _ = reader.loader_state, reader.recipe
        load(reader)
    except (IntegrityError, FileNotFoundError) as error:
        return None, str(error)
    return reader, ""


def _seen_by_all(run_folder: str, refs: list[CheckpointRef], gather: Callable[[str], list[str]]) -> list[CheckpointRef]:
    """The checkpoints of ``refs`` that every rank sees, newest first."""
    views = [json.loads(text) for text in gather(json.dumps([ref.digest for ref in refs]))]
    common = set(views[0]).intersection(*views[1:])
    if not common and any(views):
        blind = [str(rank) for rank, view in enumerate(views) if not view]
        raise RunError(
            f"ranks see different checkpoints; none is seen by ranks {', '.join(blind) or 'in common'}",
            where=run_folder,
            hint="site.storage must be a folder or bucket that all nodes share",
        )
    return [ref for ref in refs if ref.digest in common]
