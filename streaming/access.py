"""How a rank gets at its rows: in place, or through its node's prefetcher; found once, and plain data from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outgrow.contracts import JobSpec, Layout
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.fetch import index_folder
from outgrow.streaming.lost_shards import LostShard
from outgrow.streaming.steps import IndexPlace, ReadPlan
from outgrow.streaming.tiers import prefetcher
from outgrow.streaming.tiers.gate import Member, Reads
from outgrow.streaming.tiers.reading import open_reading
from outgrow.streaming.tiers.rendezvous import gate_folder


@dataclass(frozen=True, kw_only=True)
class Access:
    """``plan`` says what the rank reads and where; ``assignment`` is what the node's prefetcher is started with, empty where
    shards are read in place."""

    plan: ReadPlan
    assignment: bytes = field(repr=False)

    def join(self, local_world: int = 1, reads: Callable[[], Reads] | None = None) -> Member | InPlace:
        """The rank as a member of its node's prefetcher, which is started if need be; see ``Member``."""
        if not self.plan.gate:
            return InPlace()
        who: dict[str, Any] = {"rank": self.plan.rank, "attempt": self.plan.attempt, "local_world": local_world}
        return Member(Path(self.plan.gate), self.assignment, **who, reads=reads)


class InPlace:
    """What stands for a ``Member`` where no prefetcher is needed."""

    counts_file = ""

    def counts(self) -> None:
        """There is nothing to count."""

    def close(self) -> None:
        """There is nobody to leave."""


def open_access(job: JobSpec, layout: Layout, rank: int, *, lost: tuple[LostShard, ...] = (), attempt: str = "") -> Access:
    """The access of ``rank``, with the dataset, or all of it but its shards, on this node.

    Raises ``DataError`` where no place has the dataset, ``IntegrityError`` where bytes differ from their digest.
    """
    recipe = Recipe.model_validate(job.recipe)
    reading = open_reading(Site.model_validate(job.site), job.card)
    plan = ReadPlan(
        store=str(reading.store),
        indexes=tuple(
            IndexPlace(folder=str(index_folder(reading.store, job.card, index)), fingerprint=index.fingerprint)
            for index in job.card.indexes
        ),
        mix=Mix.of(recipe, job.card),
        layout=layout,
        rank=rank,
        seed=recipe.run.seed,
        fill_token=job.card.eos_token_id,
        gate=str(gate_folder(reading.hot, job.run)) if reading.hot else "",
        attempt=attempt,
        lost=lost,
    )
    if reading.hot is None:
        return Access(plan=plan, assignment=b"")
    told = prefetcher.Assignment(
        run=job.run,
        card=job.card,
        plan=plan,
        max_rows=recipe.validation.max_rows,
        holders=tuple(place.name for place in reading.holders),
        site=job.site,
    )
    return Access(plan=plan, assignment=told.encode())
