"""What a report says of a dataset as a whole: exact counts, from manifests and tables alone, no token read.

The document tables are read once, a part at a time: memory grows by 20 bytes a dropped document, and not with the dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from outgrow.contracts import DatasetCard, IndexCard
from outgrow.recipes.layout import total_steps
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.streaming.document_table import read_tables
from outgrow.streaming.dropped import DroppedLine, dropped_lines
from outgrow.streaming.fetch import index_folder
from outgrow.streaming.manifest import STORE_MANIFEST, read_manifest
from outgrow.streaming.report.lengths import Lengths
from outgrow.streaming.row_files import DroppedTable, dropped_file, read_dropped_table
from outgrow.streaming.rows import SplitFacts, read_facts
from outgrow.streaming.selection import REASONS, Split
from outgrow.streaming.store import StreamCounts, parse_facts
from outgrow.streaming.tiers.on_demand import Dataset

TRAINED, HELD_OUT = "training", "held out"
"""Outcomes of a document that is used; all others are reasons."""
EXAMPLES = 3
"""Documents that are named for each reason."""

_SPLITS: tuple[Split, ...] = ("train", "validation")
Counts: TypeAlias = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A dataset that is open, and the documents in no row of its first index."""

    dataset: Dataset
    dropped: Mapping[tuple[str, Split], DroppedTable]

    @property
    def store(self) -> Path:
        return self.dataset.store

    @property
    def digests(self) -> Mapping[str, str]:
        """sha256 of the store's files."""
        return self.dataset.digests


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamFacts:
    """One stream. ``documents`` and ``tokens`` are by outcome: ``training``, ``held out``, or the reason for which a document
    is in no row (those that the build left out have no tokens). ``lengths`` are of the documents that are trained on, and
    ``weight`` is the sum of their loss weights. ``examples`` names some documents for each reason."""

    name: str
    kind: str
    built: StreamCounts
    documents: Counts
    tokens: Counts
    lengths: Lengths
    weight: float
    examples: Mapping[str, tuple[DroppedLine, ...]]

    @property
    def learned(self) -> float:
        """Loss weight a token of the documents that are trained on: the share that is learned, where weights are 0 and 1."""
        return self.weight / max(1, self.tokens[TRAINED])

    @property
    def dropped(self) -> Counts:
        return {reason: count for reason, count in self.documents.items() if reason not in (TRAINED, HELD_OUT)}


@dataclass(frozen=True, kw_only=True)
class IndexFigures:
    """The training rows of one index, a ``SplitFacts`` a stream."""

    sequence_length: int
    streams: tuple[SplitFacts, ...]


@dataclass(frozen=True, kw_only=True)
class MixPart:
    """An epoch, a stage, or the whole run: optimizer steps, and tokens and passes of each stream by name."""

    name: str
    steps: int
    tokens: dict[str, float]
    passes: dict[str, float]


def look_through(dataset: Dataset, card: DatasetCard) -> Opened:
    """Raises ``IntegrityError`` where a byte differs."""
    folder = index_folder(dataset.store, card, card.indexes[0])
    _, digests = read_facts(folder)
    return Opened(
        dataset=dataset,
        dropped={
            (stream.name, split): read_dropped_table(folder, stream.name, split, digests[dropped_file(stream.name, split)])
            for stream in card.streams
            for split in _SPLITS
        },
    )


def stream_facts(opened: Opened, card: DatasetCard, recipe: Recipe) -> list[StreamFacts]:
    """The streams in the order of the recipe."""
    built = {own.name: own for own in parse_facts(read_manifest(opened.store, STORE_MANIFEST)).streams}
    found = []
    for stream in recipe.data.streams:
        documents: Counter[str] = Counter(built[stream.name].dropped)
        tokens: Counter[str] = Counter()
        lengths, weight = Lengths(), 0.0
        for split, outcome in zip(_SPLITS, (TRAINED, HELD_OUT), strict=True):
            for own_lengths, own_weight, reason in _columns(opened, stream.name, split):
                for code in np.unique(reason).tolist():
                    name = REASONS[code] if code else outcome
                    documents[name] += int((reason == code).sum())
                    tokens[name] += int(own_lengths[reason == code].sum())
                if split == "train":
                    lengths.add(own_lengths[reason == 0])
                    weight += float(own_weight[reason == 0].sum())
        found.append(
            StreamFacts(
                name=stream.name,
                kind=stream.source.kind,
                built=built[stream.name],
                documents=dict(documents),
                tokens={TRAINED: 0, **tokens},
                lengths=lengths,
                weight=weight,
                examples={
                    reason: tuple(islice(dropped_lines(opened.dataset, card, [stream.name], reason), EXAMPLES))
                    for reason in documents
                    if reason not in (TRAINED, HELD_OUT)
                },
            )
        )
    return found


def _columns(
    opened: Opened, name: str, split: Split
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.uint8]]]:
    """Lengths, loss weights and reasons of the documents of each table; reason 0: it is used."""
    table, first = opened.dropped[name, split], 0
    for documents in read_tables(opened.store, name, split, opened.digests):
        reason = np.zeros(len(documents), np.uint8)
        start, stop = np.searchsorted(table.document, [first, first + len(documents)]).tolist()
        reason[table.document[start:stop] - first] = table.reason[start:stop]
        yield documents.lengths, documents.weight, reason
        first += len(documents)


def index_figures(opened: Opened, card: DatasetCard, order: list[str]) -> list[IndexFigures]:
    """The rows of every index; streams in the order given."""
    figures = []
    for number, index in enumerate(card.indexes):
        facts, _ = read_facts(index_folder(opened.store, card, card.indexes[number]))
        own = sorted(facts.train, key=lambda split: order.index(split.name))
        figures.append(IndexFigures(sequence_length=index.sequence_length, streams=tuple(own)))
    return figures


def mix_parts(recipe: Recipe, card: DatasetCard) -> list[MixPart]:
    """What an epoch, or each stage, takes of each stream, and last what the whole run does; streams in the recipe's order."""
    mix = Mix.of(recipe, card)
    steps = total_steps(recipe, mix)
    stages = []
    for number, (phase, rows) in enumerate(mix.drawn(steps), 1):
        left = steps - phase.first_step
        own = steps if mix.in_epochs else min(left, phase.steps or left)
        name = "The whole run" if mix.in_epochs else f"Stage {number}, rows of {phase.sequence_length:,}"
        stages.append(_mix_part(name, own, recipe, card.indexes[phase.index], rows))
    if mix.in_epochs and steps == mix.steps_per_epoch:
        return stages
    if mix.in_epochs:
        _, rows = mix.drawn(mix.steps_per_epoch)[0]
        return [_mix_part("One epoch", mix.steps_per_epoch, recipe, card.indexes[0], rows), *stages]
    names = [stream.name for stream in recipe.data.streams]
    whole = MixPart(
        name="The whole run",
        steps=steps,
        tokens={name: sum(stage.tokens[name] for stage in stages) for name in names},
        passes={name: sum(stage.passes[name] for stage in stages) for name in names},
    )
    return [*stages, whole]


def _mix_part(name: str, steps: int, recipe: Recipe, index: IndexCard, rows: Sequence[int]) -> MixPart:
    taken = {own.name: (own, count) for own, count in zip(index.streams, rows, strict=True)}
    by_stream = [(stream.name, *taken[stream.name]) for stream in recipe.data.streams]
    return MixPart(
        name=name,
        steps=steps,
        tokens={name: count * own.tokens / max(1, own.rows) for name, own, count in by_stream},
        passes={name: count / max(1, own.rows) for name, own, count in by_stream},
    )
