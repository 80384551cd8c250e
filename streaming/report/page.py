"""The report of a dataset as a page: its tables, its plots and what it says beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outgrow.contracts import DatasetCard
from outgrow.html_page import Figure, Table, render_page, short, visible
from outgrow.recipes.schema import Recipe
from outgrow.streaming.report import plots, samples
from outgrow.streaming.report.advice import MOST_TOKENS_A_WORD, advice, tokens_a_word
from outgrow.streaming.report.clusters import Cluster
from outgrow.streaming.report.facts import HELD_OUT, TRAINED, IndexFigures, MixPart, StreamFacts
from outgrow.streaming.report.samples import LanguageFigures, Shown, StreamSample
from outgrow.streaming.report.template import BODY

_NAMED_CHARS = 160
"""As much is shown of what names a document."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """All that a report shows."""

    streams: Sequence[StreamFacts]
    indexes: Sequence[IndexFigures]
    mix: Sequence[MixPart]
    samples: Sequence[StreamSample]
    clusters: Sequence[Cluster]
    cluster_sizes: Sequence[tuple[int, int]]


def render(facts: Facts, card: DatasetCard, recipe: Recipe) -> str:
    """The page."""
    languages = all_languages(facts.samples)
    fertility = {code: value for code, own in languages.items() if code and (value := tokens_a_word(code, own)) is not None}
    return render_page(
        f"Data of {recipe.run.name}",
        BODY,
        _figures(facts, card, fertility),
        run=recipe.run.name,
        dataset=card.store,
        tiles=_tiles(facts, card),
        advice=advice(recipe.data, facts.streams, facts.indexes, languages, facts.mix),
        streams=_streams(facts.streams),
        drops=_drops(facts.streams),
        lengths=_lengths(facts.streams, card.sequence_length),
        rows=_rows(facts.indexes),
        mix=_mix(facts.mix, [stream.name for stream in facts.streams]),
        languages=_languages(facts.samples),
        sampled=_sampled(facts.samples),
        has_fertility=bool(fertility),
        fertility=_fertility(languages, fertility),
        clusters=[_cluster(own) for own in facts.clusters],
        no_clusters=_no_clusters(recipe),
        cleaning=_cleaning(facts.streams),
        samples=[{"name": own.name, "shown": [_shown(shown) for shown in own.shown]} for own in facts.samples],
    )


def _figures(facts: Facts, card: DatasetCard, fertility: Mapping[str, float]) -> dict[str, Figure]:
    """The plots by the id of their place in the page; those that would show nothing are left out."""
    figures = {
        "tokens": plots.tokens_by_outcome(facts.streams),
        "documents": plots.documents_by_outcome(facts.streams),
        "lengths": plots.lengths(facts.streams, [index.sequence_length for index in card.indexes]),
        "rows": plots.rows(facts.indexes),
        "mix": plots.mix(facts.mix, [stream.name for stream in facts.streams]),
        "languages": plots.languages(facts.samples),
        "learned": plots.learned(facts.streams),
    }
    if fertility:
        figures["fertility"] = plots.fertility(fertility, MOST_TOKENS_A_WORD)
    if facts.clusters:
        figures["clusters"] = plots.cluster_sizes(facts.cluster_sizes)
    if any(stream.built.cleaned for stream in facts.streams):
        figures["cleaning"] = plots.cleaning(facts.streams)
    return figures


def all_languages(found: Sequence[StreamSample]) -> dict[str, LanguageFigures]:
    """The figures of every language over all streams, the most sampled first."""
    whole: dict[str, LanguageFigures] = {}
    for sample in found:
        for code, own in sample.languages.items():
            whole[code] = whole.get(code, LanguageFigures()) + own
    return dict(sorted(whole.items(), key=lambda item: (-item[1].documents, item[0])))


# --- tables -----------------------------------------------------------------------------------------------------------


def _tiles(facts: Facts, card: DatasetCard) -> list[tuple[str, str]]:
    documents = sum(stream.documents.get(TRAINED, 0) for stream in facts.streams)
    dropped = sum(count for stream in facts.streams for count in stream.dropped.values())
    run = facts.mix[-1]
    return [
        (short(card.tokens).strip(), "tokens to train on"),
        (f"{documents:,}", "documents"),
        (f"{card.rows:,}", f"rows of {card.sequence_length:,}"),
        (f"{card.fill:.1%}", "of them filled"),
        (f"{dropped:,}", "documents dropped"),
        (short(sum(stream.tokens.get(HELD_OUT, 0) for stream in facts.streams)).strip(), "tokens held out"),
        (short(sum(run.tokens.values())).strip(), f"tokens of the run, {run.steps:,} step{'s' * (run.steps != 1)}"),
    ]


def _streams(streams: Sequence[StreamFacts]) -> Table:
    rows: Table = [("stream", "source", "documents", "tokens", "learned", "held out", "dropped", "source size")]
    for stream in streams:
        rows.append(
            (
                stream.name,
                stream.kind,
                f"{stream.documents.get(TRAINED, 0):,}",
                f"{stream.tokens[TRAINED]:,}",
                f"{stream.learned:.1%}",
                f"{stream.documents.get(HELD_OUT, 0):,}",
                f"{sum(stream.dropped.values()):,}",
                f"{short(stream.built.source_bytes)}B",
            )
        )
    return rows


def _drops(streams: Sequence[StreamFacts]) -> Table:
    rows: Table = [("stream", "reason", "documents", "tokens", "some of them")]
    for stream in streams:
        for reason, count in sorted(stream.dropped.items(), key=lambda item: -item[1]):
            named = [f"{line.source}: {line.detail}" if line.detail else line.source for line in stream.examples[reason]]
            tokens = f"{stream.tokens[reason]:,}" if reason in stream.tokens else "—"
            rows.append((stream.name, reason, f"{count:,}", tokens, "\n".join(visible(one[:_NAMED_CHARS]) for one in named)))
    return rows


def _lengths(streams: Sequence[StreamFacts], sequence_length: int) -> Table:
    rows: Table = [("stream", "10% up to", "half up to", "90% up to", "longest", f"longer than {sequence_length:,}")]
    for stream in streams:
        own = stream.lengths
        quantiles = (f"{own.quantile(share):,}" for share in (0.1, 0.5, 0.9))
        rows.append((stream.name, *quantiles, f"{own.longest:,}", f"{own.longer_than(sequence_length):.1%}"))
    return rows


def _rows(indexes: Sequence[IndexFigures]) -> Table:
    rows: Table = [("stream", "row length", "rows", "bound", "filled", "end at a border")]
    for index in indexes:
        for own in index.streams:
            filled = own.tokens / max(1, own.rows * index.sequence_length)
            at_borders = f"{own.cuts_at_borders / own.cuts:.1%}" if own.cuts else "—"
            length = f"{index.sequence_length:,}"
            rows.append((own.name, length, f"{own.rows:,}", f"{own.fewest_rows:,}", f"{filled:.2%}", at_borders))
    return rows


def _mix(parts: Sequence[MixPart], names: Sequence[str]) -> Table:
    rows: Table = [("part", "steps", "tokens", *names)]
    for part in parts:
        whole = sum(part.tokens.values())
        cells = (f"{part.tokens[name] / max(1, whole):.1%} · {part.passes[name]:.2f}×" for name in names)
        rows.append((part.name, f"{part.steps:,}", short(whole).strip(), *cells))
    return rows


def _languages(found: Sequence[StreamSample]) -> Table:
    rows: Table = [("stream", "language", "documents", "share")]
    for sample in found:
        for code, own in sample.languages.items():
            share = own.documents / max(1, sample.documents)
            rows.append((sample.name, code or plots.UNKNOWN, f"{own.documents:,}", f"{share:.1%}"))
    return rows


def _sampled(found: Sequence[StreamSample]) -> str:
    counts = ", ".join(f"{own.documents:,} of {own.name}" for own in found)
    return (
        f"A sample: the first {samples.TOKENS:,} tokens of at most {samples.DOCUMENTS:,} documents a stream, in at most "
        f"{samples.SHARDS_READ} shards spread evenly over it: {counts}. Figures of tokens a word are of the same."
    )


def _fertility(languages: Mapping[str, LanguageFigures], fertility: Mapping[str, float]) -> Table:
    rows: Table = [("language", "tokens a word", "characters a token", "words of prose", "sampled tokens")]
    for code, own in languages.items():
        per_word = f"{fertility[code]:.2f}" if code in fertility else "—"
        chars = f"{own.chars / own.tokens:.2f}" if own.tokens else "—"
        rows.append((code or plots.UNKNOWN, per_word, chars, f"{own.prose_words:,}", f"{own.tokens:,}"))
    return rows


def _cluster(own: Cluster) -> dict[str, Any]:
    more = own.size - len(own.examples)
    return {
        "kept": visible(own.kept),
        "kept_stream": own.kept_stream,
        "held_out": own.held_out,
        "beginning": visible(" ".join(own.beginning.split())),
        "size": f"{own.size:,}",
        "why": "\n".join(f"{count:,} {reason}" for reason, count in own.reasons.items()),
        "examples": visible(", ".join(own.examples)) + (f" and {more:,} more" if more else ""),
    }


def _no_clusters(recipe: Recipe) -> str:
    remove = recipe.data.duplicates.remove
    if remove == "none":
        return "Duplicates were not looked for: set data.duplicates.remove to exact or near."
    return f"No document is like another (data.duplicates.remove: {remove})."


def _cleaning(streams: Sequence[StreamFacts]) -> Table:
    rows: Table = [("stream", "step", "documents changed", "changes")]
    for stream in streams:
        rows += [(stream.name, own.step, f"{own.documents:,}", f"{own.changes:,}") for own in stream.built.cleaned]
    return rows


def _shown(own: Shown) -> dict[str, Any]:
    parts = [(label, [{"text": visible(p.text), "weight": p.weight} for p in pieces]) for label, pieces in own.parts]
    all_learned = all(piece.weight == 1 for _, pieces in own.parts for piece in pieces)
    notes = [f"{own.tokens:,} tokens", *["its beginning"] * own.cut, *["all of it is learned"] * all_learned]
    return {"source": visible(own.source), "note": ", ".join(notes), "parts": parts, "all_learned": all_learned}
