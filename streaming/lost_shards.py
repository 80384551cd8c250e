"""Shards of the training rows that a run goes on without, and the documents that lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import Record
from outgrow.streaming.tiers.shard_list import ShardList


@dataclass(frozen=True, order=True, kw_only=True)
class LostShard(Record):
    """Shard ``shard`` of the training split of ``stream``, whose rows the run has given up."""

    stream: str
    shard: int


def lost_documents(store: Path, lost: Sequence[LostShard]) -> dict[str, list[range]]:
    """The documents in the shards ``lost`` by stream, numbered in its training split; as ``RowIndex.open`` takes them.

    ``store`` is a folder with manifest and tables of the token store. Raises ``IntegrityError`` where a byte of them differs.
    """
    if not lost:
        return {}
    names = sorted({shard.stream for shard in lost})
    shards = ShardList.open(store, names)
    ends = {name: [0, *shards.documents(number, "train").tolist()] for number, name in enumerate(names)}
    found: dict[str, list[range]] = {name: [] for name in names}
    for shard in sorted(lost):
        found[shard.stream].append(range(*ends[shard.stream][shard.shard : shard.shard + 2]))
    return found
