"""What training reads, opened: ``streaming`` is imported here, when a rank needs it, and not with the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from outgrow.contracts import Context, JobSpec, JsonDict, Layout, Loader, ShardCounts, StepRows
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.by_rank_0 import by_rank_0
from outgrow.trainers.checkpoint.resume import gather_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # type: ignore[import-untyped]

    from outgrow.streaming.lost_shards import LostShard


class Rows:
    """The training rows of a rank: a ``Loader`` that can be taken back to an earlier step. ``open_from`` gives one from a step
    on."""

    def __init__(self, open_from: Callable[[int], Loader], step: int) -> None:
        self._open_from = open_from
        self._loader = open_from(step)

    def go_back(self, step: int) -> None:
        """From here on rows are those of ``step`` and after. A collective: what fetches shards for a node ends with its last
        reader, and only then is another begun."""
        self._loader.close()
        gather_texts("")
        self._loader = self._open_from(step)

    def __iter__(self) -> Iterator[StepRows]:
        return iter(self._loader)

    def state(self, next_step: int) -> JsonDict:
        return self._loader.state(next_step)

    def shard_counts(self) -> ShardCounts | None:
        return self._loader.shard_counts()

    def shard_counts_file(self) -> str:
        return self._loader.shard_counts_file()

    def ready_steps(self) -> int | None:
        return self._loader.ready_steps()

    def close(self) -> None:
        self._loader.close()


def open_loader(job: JobSpec, context: Context, layout: Layout, steps: range, lost: tuple[LostShard, ...]) -> Rows:
    """The training rows of this rank in ``steps``."""
    from outgrow.streaming.loader import build_loader

    def open_from(step: int) -> Loader:
        return build_loader(
            job,
            layout,
            context.rank,
            start_step=step,
            stop_step=steps.stop,
            lost=lost,
            local_world=context.local_world,
            attempt=context.attempt,
        )

    return Rows(open_from, steps.start)


def open_validation(
    job: JobSpec, context: Context, layout: Layout, lost: tuple[LostShard, ...]
) -> Iterable[tuple[str, StepRows]]:
    """The held-out rows of this rank by stream; nothing where the dataset has none."""
    from outgrow.streaming.loader import build_validation

    return build_validation(job, layout, context.rank, lost=lost, attempt=context.attempt) if job.card.validation_rows else ()


def open_tokenizer(job: JobSpec) -> Tokenizer:
    """The tokenizer of the dataset."""
    from tokenizers import Tokenizer

    from outgrow.streaming.store import TOKENIZER
    from outgrow.streaming.tiers.reading import open_reading

    store = open_reading(Site.model_validate(job.site), job.card).store
    tokenizer = Tokenizer.from_file(str(store / TOKENIZER / "tokenizer.json"))
    tokenizer.no_truncation()  # its file may ask for either
    tokenizer.no_padding()
    return tokenizer


def lost_shards(storage: Storage, run_folder: str, rank: int) -> tuple[LostShard, ...]:
    """The shards that the run goes on without, as one rank reads them: equal on all. A collective."""
    from outgrow.streaming.quarantine import read_lost

    return by_rank_0(rank, lambda: read_lost(storage, run_folder))
