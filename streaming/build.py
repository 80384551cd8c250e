"""``build``: from a recipe's streams to a committed token store and row indexes, and the card that names them.

A dataset is identified by the content of its inputs and what the recipe does with them, so building twice does nothing the
second time, on any machine, and a build that was interrupted goes on where it was. With a remote ``storage`` the dataset is
built in ``Site.cache`` and then uploaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError, OutgrowError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.data import Data, FolderTokenizer, TrainTokenizer
from outgrow.recipes.schema.site import Site
from outgrow.recipes.site_loading import recipe_names
from outgrow.storage import Storage, sync_folder, sync_tree
from outgrow.streaming.aside import Unfinished, building_folder, discard, put_in_place, remove_abandoned, unfinished
from outgrow.streaming.card import index_card
from outgrow.streaming.catalog import content_key, index_identities, remembered, section_key, stored_bytes, upload
from outgrow.streaming.manifest import folders, is_committed
from outgrow.streaming.parts import has_parts
from outgrow.streaming.pool import ordered_map
from outgrow.streaming.render import prepare_tokenizer, template_identity, template_text
from outgrow.streaming.row_building import build_index
from outgrow.streaming.rows import read_facts
from outgrow.streaming.sampling import forecast_bytes, sample_texts
from outgrow.streaming.selection import select
from outgrow.streaming.sources import Source, open_source
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import UNIT_BYTES
from outgrow.streaming.store import (
    STORE,
    TOKENIZER,
    Mapper,
    Progress,
    Report,
    read_store,
    store_fingerprint,
    write_store,
)
from outgrow.streaming.tokenizer import TextTokenizer, copy_tokenizer, train


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """``built`` is False where the dataset was there already; ``note`` says in one line what was done or found."""

    card: DatasetCard
    built: bool
    note: str


def silent(progress: Progress) -> None:
    """Show nothing."""


def find(recipe: Recipe, site: Site) -> DatasetCard | None:
    """The card of the dataset of this recipe, None where it is not built or its sources have changed since.

    Where the sources are not on this machine, the dataset that was built from the same ``data`` section counts. Where none was
    built from that section, the sources are not read.
    """
    storage = site.open_storage()
    if not storage.exists(section_key(recipe)):
        return None
    if _absent_sources(recipe, site):
        return remembered(storage, section_key(recipe))
    identity = _identity(recipe.data, site, _open_sources(recipe.data, site))
    return remembered(storage, content_key(recipe, identity))


def build(recipe: Recipe, site: Site, *, progress: Report = silent, mapper: Mapper = ordered_map) -> BuildResult:
    """Make the dataset of a recipe, or find it made; ``site`` is bound to the recipe.

    ``mapper`` runs the work, ``site.build_processes`` units at a time. Interrupted, by whatever, the same call goes on after
    the last finished part. Raises ``DataError``, before a shard is written, where a source or tokenizer is missing or wrong or
    the disk lacks room, and for whatever the system refuses meanwhile.
    """
    try:
        return _build(recipe, site, progress, mapper)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the dataset cannot be built: {reason}", where=error.filename or site.storage) from error


def _build(recipe: Recipe, site: Site, progress: Report, mapper: Mapper) -> BuildResult:
    storage = site.open_storage()
    before = remembered(storage, section_key(recipe))
    if before is not None and (absent := _absent_sources(recipe, site)):
        note = f"{', '.join(absent)} not on this machine; using dataset {before.store}, built from the same data section"
        return BuildResult(card=before, built=False, note=note)
    progress(Progress(stage="inputs"))
    sources = _open_sources(recipe.data, site)
    identity = _identity(recipe.data, site, sources)
    card = remembered(storage, content_key(recipe, identity))
    if card is not None:
        if card != before:
            storage.write_json(section_key(recipe), card.to_dict())
        return BuildResult(card=card, built=False, note=_up_to_date(card))

    local = storage if storage.is_local else Storage(site.cache)
    store = f"datasets/{identity[:16]}"
    new_store = _ensure_store(Path(local.path(store)), recipe.data, site, sources, identity, progress, mapper)
    new_index, card = _ensure_indexes(local, store, recipe, progress)
    if not storage.is_local:
        for key in folders(card):
            upload(Path(local.path(key)), storage, key, lambda done, total: progress(_uploaded(done, total)))
    for key in (content_key(recipe, identity), section_key(recipe)):
        storage.write_json(key, card.to_dict())
    if storage.is_local and not new_store and not new_index:  # another build made them meanwhile, or died before this line
        return BuildResult(card=card, built=False, note=_up_to_date(card))
    done = "built" if new_store else "indexed anew" if new_index else "uploaded"
    return BuildResult(card=card, built=True, note=_note(done, card, recipe.data, unfinished(Path(local.path("datasets")))))


def _uploaded(done_bytes: int, total_bytes: int) -> Progress:
    return Progress(stage="upload", done_bytes=done_bytes, total_bytes=total_bytes)


def _up_to_date(card: DatasetCard) -> str:
    return f"nothing to do: dataset {card.store} is up to date"


def _note(done: str, card: DatasetCard, data: Data, left: Sequence[Unfinished]) -> str:
    note = f"{done} dataset {card.store}"
    unvalidated = [stream.name for stream in card.streams if not stream.validation_documents]
    if data.validation_fraction and unvalidated:
        note += f"; too few documents to hold one out for validation: {', '.join(unvalidated)}"
    if left:
        size = sum(build.num_bytes for build in left) / 1e9
        note += f"; {len(left)} other build(s) never finished and take {size:,.2f} GB: outgrow data unfinished shows them"
    return note


def _open_sources(data: Data, site: Site) -> dict[str, Source]:
    digests = DigestCache(Path(site.cache).expanduser())
    return {stream.name: open_source(stream, site, digests) for stream in data.streams}


def _absent_sources(recipe: Recipe, site: Site) -> list[str]:
    """Places of the data section (streams, tokenizer, templates) that are not on this machine."""
    places = [site.locate(name) for key, name in recipe_names(recipe) if key.startswith("data.")]
    return [place for place in dict.fromkeys(places) if not Path(place).exists()]


def _identity(data: Data, site: Site, sources: Mapping[str, Source]) -> str:
    given = TextTokenizer(Path(site.locate(data.tokenizer.path))) if isinstance(data.tokenizer, FolderTokenizer) else None
    inputs = {name: source.inputs for name, source in sources.items()}
    return store_fingerprint(data, inputs, given, template_identity(data, site))


# --- the store --------------------------------------------------------------------------------------------------------


def _ensure_store(
    target: Path, data: Data, site: Site, sources: dict[str, Source], identity: str, progress: Report, mapper: Mapper
) -> bool:
    """Build the store in ``target`` unless it is there, or go on with it; True where it was built.

    Finished parts are left for the next build, whatever ended this one.
    """
    if is_committed(target):
        return False
    remove_abandoned(target.parent)
    with building_folder(target, lambda: progress(Progress(stage="waiting"))) as building:
        if building is None:
            return False
        try:
            _write_store(building, data, site, sources, identity, progress, mapper)
        except OutgrowError:
            if not has_parts(building):
                discard(building)
            raise
        put_in_place(building / STORE, target)
        discard(building)
        return True


def _write_store(
    building: Path, data: Data, site: Site, sources: dict[str, Source], identity: str, progress: Report, mapper: Mapper
) -> None:
    if is_committed(building / STORE):  # an earlier build died before it was renamed
        return
    folder = building / STORE / TOKENIZER
    if not folder.is_dir():
        progress(Progress(stage="tokenizer"))
        _make_tokenizer(building / TOKENIZER, data, site, sources)
        folder.parent.mkdir(exist_ok=True)
        (building / TOKENIZER).rename(folder)
        sync_folder(folder.parent)
    templates = tuple(template_text(stream, site, folder) for stream in data.streams)
    _check_room(building, forecast_bytes(data, sources, TextTokenizer(folder)))
    processes = _processes(site, sources)
    write_store(building, data, sources, templates, identity, mapper=mapper, processes=processes, report=progress)


def _make_tokenizer(folder: Path, data: Data, site: Site, sources: Mapping[str, Source]) -> None:
    """The tokenizer with the tokens that the recipe adds to it, in ``folder``, durable."""
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was interrupted here
    match data.tokenizer:
        case TrainTokenizer() as wanted:
            train(sample_texts(data, sources, wanted.sample_bytes), wanted.vocab_size, folder)
        case FolderTokenizer() as wanted:
            copy_tokenizer(Path(site.locate(wanted.path)), folder)
    prepare_tokenizer(folder, data, site)
    sync_tree(folder)


def _check_room(building: Path, needed_bytes: int) -> None:
    free_bytes = Storage(str(building)).free_bytes()
    written_bytes = sum(path.stat().st_size for path in building.rglob("*") if path.is_file())
    if free_bytes is not None and needed_bytes > free_bytes + written_bytes:
        raise DataError(
            f"the dataset takes about {needed_bytes / 1e9:.2f} GB, and {free_bytes / 1e9:.2f} GB are free",
            where=str(building.parent),
            hint="make room (outgrow data unfinished shows what other builds have left), or set storage (with a URL: cache) in "
            "site.yaml to a larger disk",
        )


def _processes(site: Site, sources: Mapping[str, Source]) -> int:
    """Processes to tokenise with: no more than there are units."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = cores if site.build_processes == "auto" else site.build_processes
    text_bytes = sum(item.text_bytes for source in sources.values() for item in source.inputs)
    return min(wanted, max(1, text_bytes // UNIT_BYTES))


# --- the indexes and the card -----------------------------------------------------------------------------------------


def _ensure_indexes(local: Storage, store: str, recipe: Recipe, progress: Report) -> tuple[bool, DatasetCard]:
    """Make the recipe's indexes beside the store's files unless they are there; whether one was made, and the card."""
    folder = Path(local.path(store))
    facts = read_store(folder)
    keys = [f"{store}/rows-{identity[:16]}" for identity in index_identities(recipe, facts.fingerprint)]
    paths = [Path(local.path(key)) for key in keys]
    missing = {length: path for length, path in zip(recipe.data.sequence_lengths, paths, strict=True) if not is_committed(path)}
    if missing:
        progress(Progress(stage="selection"))
        selection = select(folder, recipe.data)
        progress(Progress(stage="index"))
        for length, path in missing.items():
            build_index(folder, path, data=recipe.data, sequence_length=length, seed=recipe.run.seed, selection=selection)
    card = DatasetCard(
        store=store,
        store_fingerprint=facts.fingerprint,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        vocab_size=facts.vocab_size,
        eos_token_id=facts.eos_token_id,
        bytes=sum(stored_bytes(Path(local.path(key))) for key in (store, *keys)),
        indexes=tuple(index_card(key, facts, read_facts(path)[0]) for key, path in zip(keys, paths, strict=True)),
    )
    return bool(missing), card
