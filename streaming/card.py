"""A dataset's card: put together from what store and indexes say of themselves, and as text for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from outgrow.contracts import DatasetCard, IndexCard, StreamCard
from outgrow.streaming.rows import IndexFacts
from outgrow.streaming.store import StoreFacts

_COLUMNS = ("stream", "documents", "tokens", "rows", "val. documents", "val. tokens", "val. rows", "dropped", "source MB")


def index_card(folder: str, store: StoreFacts, index: IndexFacts) -> IndexCard:
    """The card of the index in ``folder`` (relative to the storage); its streams count what is used, and what the build, the
    choice of documents and the index dropped."""
    train = {split.name: split for split in index.train}
    validation = {split.name: split for split in index.validation}
    return IndexCard(
        folder=folder,
        fingerprint=index.fingerprint,
        sequence_length=index.sequence_length,
        streams=tuple(
            StreamCard(
                name=name,
                documents=train[name].documents,
                tokens=train[name].tokens,
                rows=train[name].rows,
                validation_documents=validation[name].documents,
                validation_tokens=validation[name].tokens,
                validation_rows=validation[name].rows,
                dropped=dict(Counter(stream.dropped) + Counter(train[name].dropped) + Counter(validation[name].dropped)),
                source_bytes=stream.source_bytes,
                pairs=train[name].pairs,
            )
            for stream in store.streams
            for name in (stream.name,)
        ),
    )


def describe(card: DatasetCard, facts: StoreFacts, indexes: Sequence[IndexFacts]) -> str:
    """The card over several lines: the whole and its row indexes first, then a table with a line a stream, then what cleaning
    changed and what was dropped and why. ``facts`` and ``indexes`` are what store and indexes say of themselves."""
    lines = [
        f"dataset    {card.store} ({card.bytes / 1e6:,.1f} MB)",
        f"store      {card.store_fingerprint}",
        f"tokenizer  {card.tokenizer_fingerprint}, {card.vocab_size:,} tokens, end of text {card.eos_token_id}",
        f"validation {card.validation_rows:,} rows of {card.sequence_length:,}",
    ]
    for index in indexes:
        lines += [
            f"row index  {index.fingerprint}",
            f"training   {index.tokens:,} tokens in {index.rows:,} rows of {index.sequence_length:,}, {index.fill:.2%} full"
            + _cuts(index),
        ]
    lines += ["", *_columns([_COLUMNS, *(_row(stream) for stream in card.streams)])]
    for counts in facts.streams:
        changed = [f"{step.step} {step.changes:,} in {step.documents:,} documents" for step in counts.cleaned]
        if changed:
            lines.append(f"cleaned in {counts.name}: {', '.join(changed)}")
    for stream in card.streams:
        if stream.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stream.dropped.items()))
            lines.append(f"dropped in {stream.name}: {reasons}")
    return "\n".join(lines)


def _cuts(index: IndexFacts) -> str:
    cuts, good = sum(split.cuts for split in index.train), sum(split.cuts_at_borders for split in index.train)
    return f"; {good / cuts:.1%} of the cuts between rows spare sentences and turns" if cuts else ""


def _row(stream: StreamCard) -> tuple[str, ...]:
    return (
        stream.name,
        f"{stream.documents:,}",
        f"{stream.tokens:,}",
        f"{stream.rows:,}",
        f"{stream.validation_documents:,}",
        f"{stream.validation_tokens:,}",
        f"{stream.validation_rows:,}",
        f"{sum(stream.dropped.values()):,}",
        f"{stream.source_bytes / 1e6:,.1f}",
    )


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, the first of each on the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
