"""A dataset's card as text for a person."""

from __future__ import annotations

from outgrow.contracts import DatasetCard
from outgrow.streaming.store import StoreFacts

_COLUMNS = ("stream", "documents", "tokens", "rows", "val. documents", "val. tokens", "val. rows", "skipped", "source MB")


def describe(card: DatasetCard, facts: StoreFacts) -> str:
    """The card over several lines: the whole first, then a table with a line a stream, then what was skipped and why."""
    lines = [
        f"dataset    {card.store} ({card.bytes / 1e6:,.1f} MB)",
        f"store      {card.store_fingerprint}",
        f"row index  {card.index_fingerprint}",
        f"tokenizer  {card.tokenizer_fingerprint}, {card.vocab_size:,} tokens, end of text {card.eos_token_id}",
        f"training   {card.tokens:,} tokens in {card.rows:,} rows of {card.sequence_length:,}, {card.fill:.2%} full",
        f"validation {card.validation_rows:,} rows",
        "",
    ]
    table = [
        (
            stream.name,
            f"{stream.documents:,}",
            f"{stream.tokens:,}",
            f"{stream.rows:,}",
            f"{stream.validation_documents:,}",
            f"{stream.validation_tokens:,}",
            f"{stream.validation_rows:,}",
            f"{stream.skipped:,}",
            f"{stream.source_bytes / 1e6:,.1f}",
        )
        for stream in card.streams
    ]
    widths = [max(len(row[i]) for row in (_COLUMNS, *table)) for i in range(len(_COLUMNS))]
    for row in (_COLUMNS, *table):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    for counts in facts.streams:
        if counts.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.skipped.items())
            lines.append(f"skipped in {counts.name}: {reasons}")
    return "\n".join(lines)
