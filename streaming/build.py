"""``build``: from a recipe's streams to a committed token store and row index, and the card that names both.

A dataset is identified by the content of its inputs and what the recipe does with them, so building twice does nothing the
second time, on any machine. ``datasets/by-recipe/`` remembers cards by that identity, and by the text of the ``data`` section:
a machine that lacks the sources finds the dataset by the latter. With a remote ``storage`` the dataset is built in
``Site.cache`` and then uploaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import DatasetCard, StreamCard
from outgrow.errors import DataError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.data import CustomSource, Data, FolderTokenizer, TrainTokenizer
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, fingerprint
from outgrow.streaming import rows
from outgrow.streaming.aside import aside_folder, put_in_place, remove_abandoned
from outgrow.streaming.manifest import FILES, MARKER, is_committed, read_manifest
from outgrow.streaming.sampling import forecast_bytes, sample_texts
from outgrow.streaming.sources import Source, open_source
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import UNIT_BYTES
from outgrow.streaming.store import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    Progress,
    Report,
    StoreFacts,
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
    if not storage.exists(_section_key(recipe)):
        return None
    if _absent_sources(recipe.data, site):
        return _remembered(storage, _section_key(recipe))
    identity = _identity(recipe.data, site, _open_sources(recipe.data, site))
    return _remembered(storage, _content_key(recipe, identity))


def build(recipe: Recipe, site: Site, *, progress: Report = silent) -> BuildResult:
    """Make the dataset of a recipe, or find it made; ``site`` is bound to the recipe.

    Raises ``DataError``, before a shard is written, where a source or tokenizer is missing or wrong or the disk lacks room, and
    for whatever the system refuses meanwhile.
    """
    try:
        return _build(recipe, site, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the dataset cannot be built: {reason}", where=error.filename or site.storage) from error


def _build(recipe: Recipe, site: Site, progress: Report) -> BuildResult:
    storage = site.open_storage()
    before = _remembered(storage, _section_key(recipe))
    if before is not None and (absent := _absent_sources(recipe.data, site)):
        note = f"{', '.join(absent)} not on this machine; using dataset {before.store}, built from the same data section"
        return BuildResult(card=before, built=False, note=note)
    progress(Progress(stage="inputs"))
    sources = _open_sources(recipe.data, site)
    identity = _identity(recipe.data, site, sources)
    card = _remembered(storage, _content_key(recipe, identity))
    if card is not None:
        if card != before:
            storage.write_json(_section_key(recipe), card.to_dict())
        return BuildResult(card=card, built=False, note=_up_to_date(card))

    local = storage if storage.is_local else Storage(site.cache)
    store = f"datasets/{identity[:16]}"
    new_store = _ensure_store(Path(local.path(store)), recipe.data, site, sources, identity, progress)
    index = f"{store}/rows-{_index_identity(recipe, identity)[:16]}"
    new_index = not is_committed(Path(local.path(index)))
    card = _ensure_index(local, store, index, recipe, progress)
    if not storage.is_local:
        for key in (card.store, card.index):
            _upload(Path(local.path(key)), storage, key, progress)
    for key in (_content_key(recipe, identity), _section_key(recipe)):
        storage.write_json(key, card.to_dict())
    if storage.is_local and not new_store and not new_index:  # another build made them meanwhile, or died before this line
        return BuildResult(card=card, built=False, note=_up_to_date(card))
    done = "built" if new_store else "indexed anew" if new_index else "uploaded"
    return BuildResult(card=card, built=True, note=_note(done, card, recipe.data))


def _up_to_date(card: DatasetCard) -> str:
    return f"nothing to do: dataset {card.store} is up to date"


def _note(done: str, card: DatasetCard, data: Data) -> str:
    note = f"{done} dataset {card.store}"
    unvalidated = [stream.name for stream in card.streams if not stream.validation_documents]
    if data.validation_fraction and unvalidated:
        note += f"; too few documents to hold one out for validation: {', '.join(unvalidated)}"
    return note


def _open_sources(data: Data, site: Site) -> dict[str, Source]:
    digests = DigestCache(Path(site.cache).expanduser())
    return {stream.name: open_source(stream, site, digests) for stream in data.streams}


def _absent_sources(data: Data, site: Site) -> list[str]:
    """Places of the recipe's streams and tokenizer that are not on this machine."""
    names = [stream.source.path for stream in data.streams if not isinstance(stream.source, CustomSource)]
    if isinstance(data.tokenizer, FolderTokenizer):
        names.append(data.tokenizer.path)
    places = [site.locate(name) for name in names]
    return [place for place in dict.fromkeys(places) if not Path(place).exists()]


def _identity(data: Data, site: Site, sources: Mapping[str, Source]) -> str:
    given = TextTokenizer(Path(site.locate(data.tokenizer.path))) if isinstance(data.tokenizer, FolderTokenizer) else None
    return store_fingerprint(data, {name: source.inputs for name, source in sources.items()}, given)


# --- the store --------------------------------------------------------------------------------------------------------


def _ensure_store(target: Path, data: Data, site: Site, sources: dict[str, Source], identity: str, progress: Report) -> bool:
    """Build the store in ``target`` unless it is there; True where it was built."""
    if is_committed(target):
        return False
    remove_abandoned(target.parent)
    with aside_folder(target.parent) as folder:
        tokenizer = _make_tokenizer(folder / TOKENIZER, data, site, sources, progress)
        _check_room(target.parent, forecast_bytes(tuple(sources.values()), tokenizer))
        write_store(folder, data, sources, identity, processes=_processes(site, sources), report=progress)
        return put_in_place(folder, target)  # False: another build of the same dataset was faster


def _make_tokenizer(folder: Path, data: Data, site: Site, sources: Mapping[str, Source], progress: Report) -> TextTokenizer:
    progress(Progress(stage="tokenizer"))
    match data.tokenizer:
        case TrainTokenizer() as wanted:
            return train(sample_texts(tuple(sources.values()), wanted.sample_bytes), wanted.vocab_size, folder)
        case FolderTokenizer() as wanted:
            return copy_tokenizer(Path(site.locate(wanted.path)), folder)


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = Storage(str(folder)).free_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise DataError(
            f"the dataset takes about {needed_bytes / 1e9:.2f} GB, and {free_bytes / 1e9:.2f} GB are free",
            where=str(folder),
            hint="make room, or set storage (with a URL: cache) in site.yaml to a larger disk",
        )


def _processes(site: Site, sources: Mapping[str, Source]) -> int:
    """Processes to tokenise with: no more than there are units."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = cores if site.build_processes == "auto" else site.build_processes
    text_bytes = sum(item.text_bytes for source in sources.values() for item in source.inputs)
    return min(wanted, max(1, text_bytes // UNIT_BYTES))


# --- the index and the card -------------------------------------------------------------------------------------------


def _ensure_index(local: Storage, store: str, index: str, recipe: Recipe, progress: Report) -> DatasetCard:
    """Build the row index beside the store's files unless it is there."""
    progress(Progress(stage="index"))
    folder = Path(local.path(store))
    facts = read_store(folder)
    made = rows.build_index(folder, Path(local.path(index)), **_row_choices(recipe))
    return _card(local, store, index, facts, made)


def _row_choices(recipe: Recipe) -> dict[str, int]:
    """What decides the rows beside the store."""
    return {
        "sequence_length": recipe.data.sequence_length,
        "window_shards": recipe.data.window_shards,
        "seed": recipe.run.seed,
    }


def _index_identity(recipe: Recipe, identity: str) -> str:
    """Fingerprint of the recipe's rows of the store ``identity``."""
    return rows.index_fingerprint(identity, **_row_choices(recipe))


def _card(local: Storage, store: str, index: str, facts: StoreFacts, made: rows.IndexFacts) -> DatasetCard:
    train_rows = {split.name: split.rows for split in made.train}
    validation_rows = {split.name: split.rows for split in made.validation}
    return DatasetCard(
        store=store,
        index=index,
        store_fingerprint=facts.fingerprint,
        index_fingerprint=made.fingerprint,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        vocab_size=facts.vocab_size,
        eos_token_id=facts.eos_token_id,
        sequence_length=made.sequence_length,
        tokens=made.tokens,
        rows=made.rows,
        fill=made.fill,
        validation_rows=made.validation_rows,
        bytes=sum(path.stat().st_size for key in (store, index) for path in _files(Path(local.path(key)))),
        streams=tuple(
            StreamCard(
                name=stream.name,
                documents=stream.documents,
                tokens=stream.tokens,
                rows=train_rows[stream.name],
                validation_documents=stream.validation_documents,
                validation_tokens=stream.validation_tokens,
                validation_rows=validation_rows[stream.name],
                skipped=sum(stream.skipped.values()),
                source_bytes=stream.source_bytes,
            )
            for stream in facts.streams
        ),
    )


def _manifest(folder: Path) -> str:
    return MANIFEST if (folder / MANIFEST).is_file() else rows.INDEX_MANIFEST


def _files(folder: Path) -> list[Path]:
    """The files of a committed folder, its manifest and, last, its marker."""
    name = _manifest(folder)
    return [*(folder / key for key in sorted(read_manifest(folder, name)[FILES])), folder / name, folder / MARKER]


# --- storage ----------------------------------------------------------------------------------------------------------


def _content_key(recipe: Recipe, identity: str) -> str:
    """Where the card of the store ``identity`` with the recipe's rows is remembered."""
    return f"datasets/by-recipe/{_index_identity(recipe, identity)}.json"


def _section_key(recipe: Recipe) -> str:
    """Where the card of this ``data`` section and seed is remembered; reading ahead changes no row."""
    section = recipe.data.model_dump(mode="json", exclude={"loader_workers"})
    key = fingerprint({"data": section, "seed": recipe.run.seed, "formats": [FORMAT, rows.FORMAT]})
    return f"datasets/by-recipe/{key}.json"


def _remembered(storage: Storage, key: str) -> DatasetCard | None:
    """The card that an earlier build left at ``key``, if its store and index are still there."""
    if not storage.exists(key):
        return None
    card = DatasetCard.from_dict(storage.read_json(key))
    return card if all(storage.exists(f"{key}/{MARKER}") for key in (card.store, card.index)) else None


def _upload(folder: Path, storage: Storage, key: str, progress: Report) -> None:
    """Copy a committed folder to ``key``, its marker last; nothing where it is there."""
    if storage.exists(f"{key}/{MARKER}"):
        return
    files = _files(folder)
    total_bytes, done_bytes = sum(path.stat().st_size for path in files), 0
    for path in files:
        storage.upload(path, f"{key}/{path.relative_to(folder).as_posix()}")
        done_bytes += path.stat().st_size
        progress(Progress(stage="upload", done_bytes=done_bytes, total_bytes=total_bytes))
