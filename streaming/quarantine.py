"""What becomes of a run that meets a shard which no place has whole: it stops, or gives up the rows that touch it.

``<run folder>/quarantine/<stream>.<shard>.json`` says what was given up; it is written once, before the ranks start again. From
then on every start reads all of these files, and every rank and world size reads those rows as empty. They keep their numbers
and places, so the order of all other rows is what it was.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outgrow.contracts import JobSpec, Record
from outgrow.errors import IntegrityError, OutgrowError, RestartError, ShardError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.streaming.fetch import index_folder, local_dataset
from outgrow.streaming.lost_shards import LostShard, lost_documents
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.tiers.shard_list import ShardList

FOLDER = "quarantine"
"""Folder of a run that holds a file for each shard that it has given up."""
_MAX_SHARDS = 16
_SHARDS_TO_ONE = 100
"""A run gives up ``_MAX_SHARDS``, or one in so many where that is more."""
_REPAIR = "repair it: outgrow data verify names every damaged file, outgrow data place shows which places have a whole one"


@dataclass(frozen=True, kw_only=True)
class LostRows(Record):
    """The rows of one row index that became empty: their numbers there, and the tokens and loss weights that they held."""

    index: str
    sequence_length: int
    tokens: int
    weight: float
    row_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ShardLoss(Record):
    """A shard that a run has given up. ``file`` is its path below the store; documents are numbered in the stream's training
    split, ``after_document`` is the first that lies behind the shard. ``time`` is Unix seconds, ``node`` where it was found.
    ``rows`` has an entry for each row index of the dataset, without rows that were given up before."""

    stream: str
    shard: int
    file: str
    reason: str
    node: str
    time: float
    first_document: int
    after_document: int
    rows: tuple[LostRows, ...]


def read_losses(storage: Storage, run_folder: str) -> tuple[ShardLoss, ...]:
    """All that the run has given up, by stream and shard. Raises ``IntegrityError`` for a file that does not say it."""
    losses = storage.read_records(f"{run_folder}/{FOLDER}", ShardLoss, hint="move the file away")
    return tuple(sorted(losses, key=lambda loss: (loss.stream, loss.shard)))


def read_lost(storage: Storage, run_folder: str) -> tuple[LostShard, ...]:
    """The shards that the run has given up, in order. One may come meanwhile: ranks must agree on what one of them has read."""
    return tuple(LostShard(stream=loss.stream, shard=loss.shard) for loss in read_losses(storage, run_folder))


def answer(error: ShardError, job: JobSpec, lost: Sequence[LostShard]) -> OutgrowError:
    """What a rank raises that met a bad shard while it read without ``lost``, as ``data.on_bad_shard`` has it.

    Under ``quarantine`` the loss is in the run's folder on return, and the answer is a ``RestartError``. It is an
    ``IntegrityError`` where the run is to stop, or has lost too much.
    """
    recipe, site = Recipe.model_validate(job.recipe), Site.model_validate(job.site)
    bad = LostShard(stream=error.stream, shard=error.shard)
    what = f"shard {bad.shard} of stream '{bad.stream}' is whole in no place"
    if recipe.data.on_bad_shard == "stop":
        hint = f"{_REPAIR}; or go on without its rows: the same command with data.on_bad_shard=quarantine"
        return ShardError(f"{what}: {error.message}", stream=bad.stream, shard=bad.shard, where=error.where, hint=hint)
    if bad in lost:
        return IntegrityError(f"{what}, and was read although the run has given it up: {error.message}", where=error.where)
    store = local_dataset(site, job.card)
    indexes = [index_folder(store, job.card, index) for index in job.card.indexes]
    shards = ShardList.open(store, sorted(stream.name for stream in job.card.streams))
    total = sum(len(shards.numbers(number, "train")) for number in range(len(shards.streams)))
    if len(lost) >= most_lost(total):
        limit = f"a run may give up {most_lost(total):,} of {total:,} training shards, and this one has given up {len(lost):,}"
        return IntegrityError(f"{what}: {error.message}; {limit}", where=error.where, hint=_REPAIR)
    loss = _loss(error, shards, store, indexes, lost)
    storage = site.open_storage()
    key = f"{job.run.folder}/{FOLDER}/{bad.stream}.{bad.shard:05}.json"
    # Where another rank was faster, it has written the same.
    storage.create(key, json.dumps(loss.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n")
    return RestartError(f"{what}: the run gives up {describe(loss)}; {error.message}", where=error.where, hint=f"see {key}")


def most_lost(num_shards: int) -> int:
    """How many of its ``num_shards`` training shards a run may give up."""
    return min(max(_MAX_SHARDS, num_shards // _SHARDS_TO_ONE), num_shards // 2)


def describe(loss: ShardLoss) -> str:
    """What is lost, for a person: rows and tokens for each length of rows."""
    return "; ".join(f"{len(rows.row_ids):,} rows of {rows.sequence_length:,} ({rows.tokens:,} tokens)" for rows in loss.rows)


def _loss(error: ShardError, shards: ShardList, store: Path, indexes: Sequence[Path], lost: Sequence[LostShard]) -> ShardLoss:
    bad = LostShard(stream=error.stream, shard=error.shard)
    stream = shards.streams.index(bad.stream)
    documents = lost_documents(store, [bad])[bad.stream][0]
    return ShardLoss(
        stream=bad.stream,
        shard=bad.shard,
        file=shards.file(shards.number(stream, "train", bad.shard)).name,
        reason=error.message,
        node=socket.gethostname(),
        time=time.time(),
        first_document=documents.start,
        after_document=documents.stop,
        rows=tuple(_rows(folder, store, lost, bad) for folder in indexes),
    )


def _rows(folder: Path, store: Path, lost: Sequence[LostShard], bad: LostShard) -> LostRows:
    """The rows of the index in ``folder`` that ``bad`` empties beyond those of ``lost``."""
    before = RowIndex.open(folder, lost_documents(store, lost))
    after = RowIndex.open(folder, lost_documents(store, [*lost, bad]))
    stream = [split.name for split in before.facts.train].index(bad.stream)
    window = bad.shard // before.facts.window_shards
    first = int(before.first_rows("train")[stream] + before.train[stream].window_rows[window])
    old, new = (index.train[stream].window(window) for index in (before, after))
    emptied = np.flatnonzero(np.diff(old.cuts) > np.diff(new.cuts))
    return LostRows(
        index=before.facts.fingerprint,
        sequence_length=before.facts.sequence_length,
        tokens=old.num_tokens - new.num_tokens,
        weight=float(old.weights[emptied].sum()),
        row_ids=tuple((first + emptied).tolist()),
    )
