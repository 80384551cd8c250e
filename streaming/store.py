"""The token store: tokenised documents of every stream and split in MDS folders, with the tokenizer and a manifest of digests.

datasets/<fingerprint[:16]>/
    streams/<name>/train/         MDS folder: shards, index.json for MosaicML's readers, shards.safetensors for ours, and
                                  documents/NNNNN.safetensors, what is known of the documents without their tokens
    streams/<name>/validation/    likewise, perhaps without a document
    streams/<name>/dropped.jsonl  a line a document that the build left out
    tokenizer/                    tokenizer.json and what belongs to it
    store.json                    manifest: counts, fingerprints, how it was made, sha256 of every file but the shards
    COMMITTED                     sha256 of store.json, written last
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from outgrow.contracts import JsonDict, Record
from outgrow.errors import DataError
from outgrow.recipes.schema.data import Data
from outgrow.storage import file_digest, fingerprint, tree_digests
from outgrow.streaming.document_table import FOLDER as TABLES
from outgrow.streaming.manifest import STORE_MANIFEST, commit, read_manifest
from outgrow.streaming.parts import DROPPED, SPLITS, StoreForm, StreamParts
from outgrow.streaming.selection import columns_identity, needs_languages, needs_signatures
from outgrow.streaming.shards import INDEX, SHARDS, ShardTable, write_index
from outgrow.streaming.sources.document import Input, Source, Unit
from outgrow.streaming.token_block import TokenBlock
from outgrow.streaming.tokenizer import TextTokenizer

FORMAT = 2
"""Counts up when the same inputs would give other bytes."""
TOKENIZER = "tokenizer"
STORE = "store"
"""The folder within a building folder that becomes the store."""

Stage: TypeAlias = Literal["inputs", "waiting", "tokenizer", "tokens", "selection", "index", "upload"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage of a build is: bytes of text (or of files uploaded), tokens written so far, seconds since it began.

    ``waiting`` is for another process that is building the same dataset. ``found_bytes`` of ``done_bytes`` were done by an
    earlier build that was interrupted.
    """

    stage: Stage
    done_bytes: int = 0
    total_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    found_bytes: int = 0


Report: TypeAlias = Callable[[Progress], None]
Work: TypeAlias = tuple[int, Unit]


class Mapper(Protocol):
    """How units become blocks: in processes of this machine (``pool.ordered_map``) or of a cluster."""

    def __call__(self, make_work: Callable[[], Callable[[Any], Any]], items: Iterable[Any], processes: int) -> Generator[Any]:
        """``make_work()(item)`` of each item, in order, with a bounded number of them in flight; closing it ends the work."""


@dataclass(frozen=True, kw_only=True)
class CleanCount(Record):
    """What one cleaning step did in a stream: ``changes`` in so many ``documents``."""

    step: str
    documents: int
    changes: int


@dataclass(frozen=True, kw_only=True)
class StreamCounts(Record):
    """What the store holds of one stream. ``dropped`` counts documents that the build left out, by reason; ``cleaned`` has an
    entry a step; ``pairs`` tells whether it holds preference pairs."""

    name: str
    documents: int
    tokens: int
    validation_documents: int
    validation_tokens: int
    dropped: dict[str, int]
    cleaned: tuple[CleanCount, ...]
    pairs: bool
    inputs: int
    source_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreFacts(Record):
    """The manifest of a store, less the digests of its files. ``data`` is what decided it of the recipe's section."""

    format: int
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    streams: tuple[StreamCounts, ...]
    data: JsonDict


# --- identity ---------------------------------------------------------------------------------------------------------


def store_choices(data: Data) -> JsonDict:
    """The keys of ``data`` that decide the store's bytes beside its inputs and templates.

    Folders, the number of processes, and what only the choice of documents, the row index or the mix depends on are left out.
    """
    return {
        **data.model_dump(mode="json", include={"tokenizer", "validation_fraction", "compression", "shard_bytes"}),
        "columns": columns_identity(data),
        "streams": [
            {
                "name": stream.name,
                "source": stream.source.model_dump(mode="json", exclude={"path", "include", "exclude"}),
                **stream.model_dump(mode="json", include={"clean", "tag"}),
                # Not asked before there were such streams: datasets from then keep their names.
                **({"use": stream.use} if stream.use != "training" else {}),
                "chat": stream.chat.model_dump(mode="json", exclude={"template"}),
            }
            for stream in data.streams
        ],
    }


def store_fingerprint(
    data: Data, inputs: Mapping[str, Sequence[Input]], tokenizer: TextTokenizer | None, templates: JsonDict
) -> str:
    """sha256 of all that decides the store's bytes: each input's name and content, how it is read, rendered, tokenised and
    divided.

    ``inputs`` by stream; ``tokenizer`` is the given one, None where it is trained on the streams; ``templates`` is their
    identity.
    """
    how = store_choices(data)
    if tokenizer is not None:
        how["tokenizer"] = {"fingerprint": tokenizer.fingerprint, "eos_token_id": tokenizer.eos_token_id}
    read = {name: [[item.name, item.digest] for item in items] for name, items in inputs.items()}
    return fingerprint({"store": FORMAT, "how": how, "templates": templates, "inputs": read})


# --- writing ----------------------------------------------------------------------------------------------------------


def write_store(
    building: Path,
    data: Data,
    sources: Mapping[str, Source],
    templates: tuple[str | None, ...],
    identity: str,
    *,
    mapper: Mapper,
    processes: int,
    report: Report,
) -> StoreFacts:
    """Make the store in the folder ``store`` of ``building``, which holds ``tokenizer`` already, and commit it; the caller
    renames it. Goes on after the last part that an earlier call finished.

    The same bytes whatever the mapper, the number of processes, and the interruptions. Raises ``DataError`` where a stream has
    nothing to train on (of ``use: validation``: to validate on), or its source changed meanwhile.
    """
    from outgrow.streaming.tokenise import tokenise_work  # heavy, and those who read a store never need it

    folder = building / STORE
    tokenizer = TextTokenizer(folder / TOKENIZER)
    form = StoreForm(
        vocab_size=tokenizer.vocab_size,
        compression=data.compression,
        shard_bytes=data.shard_bytes,
        languages=needs_languages(data),
        signatures=needs_signatures(data),
    )
    streams = [StreamParts(building, name, form) for name in sources]
    work = tokenise_work(tokenizer.folder, templates, data, languages=form.languages, signatures=form.signatures)
    with closing(mapper(work, _units(streams, sources), processes)) as blocks:
        shown = _reported(blocks, streams, sources, report)
        for number, group in groupby(shown, key=lambda block: block.stream):
            streams[number].write(group, sources[streams[number].name].inputs)
    for stream in streams:
        stream.write(iter(()), ())  # one whose source had no unit left is complete now
    for source in sources.values():
        source.check_unchanged()
    for stream, given in zip(streams, data.streams, strict=True):
        if given.use == "validation" and not stream.totals.documents["validation"]:
            raise DataError(f"stream '{stream.name}' holds no document to validate on", hint="its files may be empty")
        if given.use == "training" and not stream.totals.documents["train"]:
            raise DataError(
                f"stream '{stream.name}' holds no document to train on",
                hint="check that its files are not empty, and that data.validation_fraction leaves some",
            )
    facts = StoreFacts(
        format=FORMAT,
        fingerprint=identity,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        streams=tuple(sorted((count_stream(s, data, sources[s.name].inputs) for s in streams), key=lambda counts: counts.name)),
        data=store_choices(data),
    )
    digests = {f"{TOKENIZER}/{name}": value for name, value in tree_digests(folder / TOKENIZER).items()}
    for stream in streams:
        digests |= finish_stream(folder, stream)
    commit(folder, STORE_MANIFEST, facts.to_dict(), digests)
    return facts


def _units(streams: Sequence[StreamParts], sources: Mapping[str, Source]) -> Iterator[Work]:
    """The units that are left to do, each with the number of its stream."""
    for number, stream in enumerate(streams):
        if not stream.is_complete:
            for unit in islice(sources[stream.name].units(), stream.totals.units, None):
                yield number, unit


def _reported(
    blocks: Iterable[TokenBlock], streams: Sequence[StreamParts], sources: Mapping[str, Source], report: Report
) -> Iterator[TokenBlock]:
    """The same blocks; tells how far they are as they pass."""
    total_bytes = sum(item.text_bytes for source in sources.values() for item in source.inputs)
    found_bytes = done_bytes = sum(stream.totals.num_bytes for stream in streams)
    tokens = 0
    start = time.monotonic()
    for block in blocks:
        yield block
        done_bytes += block.num_bytes
        tokens += len(block.tokens)
        report(
            Progress(
                stage="tokens",
                done_bytes=done_bytes,
                total_bytes=total_bytes,
                tokens=tokens,
                seconds=time.monotonic() - start,
                found_bytes=found_bytes,
            )
        )


def count_stream(stream: StreamParts, data: Data, inputs: Sequence[Input]) -> StreamCounts:
    """The counts of a complete stream."""
    totals = stream.totals
    steps = next(given.clean for given in data.streams if given.name == stream.name)
    cleaned = totals.cleaned or ((0, 0),) * len(steps)
    return StreamCounts(
        name=stream.name,
        documents=totals.documents["train"],
        tokens=totals.tokens["train"],
        validation_documents=totals.documents["validation"],
        validation_tokens=totals.tokens["validation"],
        dropped=totals.dropped,
        cleaned=tuple(
            CleanCount(step=step.kind, documents=documents, changes=changes)
            for step, (documents, changes) in zip(steps, cleaned, strict=True)
        ),
        pairs=totals.pairs > 0,
        inputs=len(inputs),
        source_bytes=sum(item.num_bytes for item in inputs),
    )


def finish_stream(folder: Path, stream: StreamParts) -> dict[str, str]:
    """Write the lists of a complete stream's shards, and return the digest of every file of it but those, by path in the
    store."""
    digests: dict[str, str] = {}
    for split in SPLITS:
        below = f"streams/{stream.name}/{split}"
        write_index(folder / below, (entry for part in stream.finished() for entry in part.shards[split]))
        ShardTable.of(entry for part in stream.finished() for entry in part.shards[split]).save(folder / below)
        digests |= {f"{below}/{name}": file_digest(folder / below / name) for name in (INDEX, SHARDS)}
        for number, part in enumerate(stream.finished()):
            if split in part.tables:
                digests[f"{below}/{TABLES}/{number:05d}.safetensors"] = part.tables[split]
    digests[f"streams/{stream.name}/{DROPPED}"] = file_digest(stream.folder / DROPPED)
    return digests


# --- reading ----------------------------------------------------------------------------------------------------------


def read_store(folder: Path) -> StoreFacts:
    """The facts of a committed store. Raises ``DataError`` where it was never finished, ``IntegrityError`` where it differs."""
    return parse_facts(read_manifest(folder, STORE_MANIFEST))


def parse_facts(manifest: Mapping[str, Any]) -> StoreFacts:
    """The facts that a store's manifest holds beside the digests of its files."""
    return StoreFacts.from_dict({name: manifest[name] for name in StoreFacts.__dataclass_fields__})
