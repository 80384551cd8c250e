"""The token store: tokenised documents of every stream and split in MDS folders, with the tokenizer and a manifest of digests.

datasets/<fingerprint[:16]>/
    streams/<name>/train/        MDS folder (index.json, shards) and documents.safetensors
    streams/<name>/validation/   likewise, perhaps without a document
    tokenizer/                   tokenizer.json and what belongs to it
    store.json                   manifest: counts, fingerprints, the recipe's section, sha256 of every file
    COMMITTED                    sha256 of store.json, written last
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

from outgrow.contracts import JsonDict, Record
from outgrow.errors import DataError
from outgrow.recipes.schema.data import Data
from outgrow.storage import fingerprint
from outgrow.streaming.manifest import commit, read_manifest
from outgrow.streaming.pool import ordered_map
from outgrow.streaming.sources import Input, Source
from outgrow.streaming.tokenise import TokenBlock, Tokenise
from outgrow.streaming.tokenizer import TextTokenizer

FORMAT = 1
"""Counts up when the same inputs would give other bytes."""
MANIFEST = "store.json"
TOKENIZER = "tokenizer"

Stage: TypeAlias = Literal["inputs", "tokenizer", "tokens", "index", "upload"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage of a build is: bytes of text (or of files uploaded), tokens written so far, seconds since it began."""

    stage: Stage
    done_bytes: int = 0
    total_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0


Report: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class StreamCounts(Record):
    """What the store holds of one stream. ``skipped`` counts documents that were left out, by reason."""

    name: str
    documents: int
    tokens: int
    validation_documents: int
    validation_tokens: int
    skipped: dict[str, int]
    inputs: int
    source_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreFacts(Record):
    """The manifest of a store, less the digests of its files. ``data`` is the recipe's section that it was built from."""

    format: int
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    streams: tuple[StreamCounts, ...]
    data: JsonDict


def store_fingerprint(data: Data, inputs: Mapping[str, Sequence[Input]], tokenizer: TextTokenizer | None) -> str:
    """sha256 of all that decides the store's bytes: each input's name and content, how it is read, tokenised and divided.

    ``inputs`` by stream; ``tokenizer`` is the given one, None where it is trained on the streams. Folders, the number of
    processes and what only the row index depends on are left out.
    """
    how = data.model_dump(mode="json", include={"validation_fraction", "compression", "shard_bytes"})
    if tokenizer is None:
        how["tokenizer"] = data.tokenizer.model_dump(mode="json")
    else:
        how["tokenizer"] = {"fingerprint": tokenizer.fingerprint, "eos_token_id": tokenizer.eos_token_id}
    streams = [
        {
            "name": stream.name,
            "source": stream.source.model_dump(mode="json", exclude={"path", "include", "exclude"}),
            "inputs": [[item.name, item.digest] for item in inputs[stream.name]],
        }
        for stream in data.streams
    ]
    return fingerprint({"store": FORMAT, "how": how, "streams": streams})


def write_store(
    folder: Path, data: Data, sources: Mapping[str, Source], identity: str, *, processes: int, report: Report
) -> StoreFacts:
    """Tokenise all sources into ``folder`` (aside, holding ``tokenizer/`` already) and commit it; the caller renames it.

    The same bytes whatever the number of processes. Raises ``DataError`` where a stream has nothing to train on, or its source
    changed meanwhile.
    """
    tokenizer = TextTokenizer(folder / TOKENIZER)
    names = tuple(sources)
    units = ((number, unit) for number, name in enumerate(names) for unit in sources[name].units())
    make_work = partial(Tokenise, tokenizer.folder, data.validation_fraction)
    counts: dict[str, StreamCounts] = {}
    with closing(ordered_map(make_work, units, processes)) as blocks:
        for number, group in groupby(_reported(blocks, sources, report), key=lambda block: block.stream):
            name = names[number]
            out = folder / "streams" / name
            counts[name] = _write_stream(out, data, tokenizer.vocab_size, name, sources[name].inputs, group)
    for name, source in sources.items():
        if name not in counts or not counts[name].documents:
            raise DataError(
                f"stream '{name}' holds no document to train on",
                hint="check that its files are not empty, and that data.validation_fraction leaves some",
            )
        source.check_unchanged()
    facts = StoreFacts(
        format=FORMAT,
        fingerprint=identity,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        streams=tuple(counts[name] for name in sorted(counts)),
        data=data.model_dump(mode="json"),
    )
    commit(folder, MANIFEST, facts.to_dict())
    return facts


def read_store(folder: Path) -> StoreFacts:
    """The facts of a committed store. Raises ``DataError`` where it was never finished, ``IntegrityError`` where it differs."""
    manifest = read_manifest(folder, MANIFEST)
    return StoreFacts.from_dict({name: manifest[name] for name in StoreFacts.__dataclass_fields__})


def _write_stream(
    folder: Path, data: Data, vocab_size: int, name: str, inputs: Sequence[Input], blocks: Iterable[TokenBlock]
) -> StreamCounts:
    from outgrow.streaming._mosaic import DocumentWriter  # heavy, and a build's other processes never need it

    open_writer = partial(DocumentWriter, vocab_size=vocab_size, compression=data.compression, shard_bytes=data.shard_bytes)
    documents, tokens, skipped = Counter[bool](), Counter[bool](), Counter[str]()
    with open_writer(folder / "train") as training, open_writer(folder / "validation") as held_out:
        for block in blocks:
            for token_ids, source, meta, validation in block.documents():
                (held_out if validation else training).write(token_ids, source=source, meta=meta)
                documents[validation] += 1
                tokens[validation] += len(token_ids)
            skipped.update(block.skipped)
    return StreamCounts(
        name=name,
        documents=documents[False],
        tokens=tokens[False],
        validation_documents=documents[True],
        validation_tokens=tokens[True],
        skipped=dict(sorted(skipped.items())),
        inputs=len(inputs),
        source_bytes=sum(item.num_bytes for item in inputs),
    )


def _reported(blocks: Iterable[TokenBlock], sources: Mapping[str, Source], report: Report) -> Iterator[TokenBlock]:
    """The same blocks; tells how far they are as they pass."""
    total_bytes = sum(item.text_bytes for source in sources.values() for item in source.inputs)
    done_bytes = tokens = 0
    start = time.monotonic()
    for block in blocks:
        yield block
        done_bytes += block.num_bytes
        tokens += len(block.tokens)
        report(
            Progress(
                stage="tokens", done_bytes=done_bytes, total_bytes=total_bytes, tokens=tokens, seconds=time.monotonic() - start
            )
        )
