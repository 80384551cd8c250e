"""The plots of a report, as plotly's plain figures (data and layout), from counts alone: no text of a document is in them.

Colours of text, lines and background are left to the page's style, which knows light from dark; those of bars stand on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outgrow.html_page import MARKED, PALETTE, Figure, figure
from outgrow.streaming.report.facts import HELD_OUT, TRAINED, IndexFigures, MixPart, StreamFacts
from outgrow.streaming.report.samples import StreamSample

OUTCOMES = {
    TRAINED: "#4a86c5",
    HELD_OUT: "#6cb3cf",
    "duplicate": "#d98a3d",
    "near_duplicate": "#c9aa3c",
    "like_validation": "#c9605d",
    "language": "#b678b8",
    "too_short": "#8d83c9",
    "too_long_text": "#a59ad6",
    "too_long": "#b08068",
    "empty": "#9aa0aa",
    "undecodable": "#858b96",
    "malformed": "#717783",
    "missing": "#aeb3bc",
    "unrenderable": "#9aa357",
}
"""Colours of what becomes of documents, in the order of bars and legends."""
UNKNOWN = "not known"

_SHARES = {"range": [0, 1.02], "tickformat": ".0%", "dtick": 0.2}
_BAR = 34
"""Height of a bar with its gap, pixels."""


def documents_by_outcome(streams: Sequence[StreamFacts]) -> Figure:
    return _outcomes(streams, [stream.documents for stream in streams], "documents")


def tokens_by_outcome(streams: Sequence[StreamFacts]) -> Figure:
    return _outcomes(streams, [stream.tokens for stream in streams], "tokens")


def lengths(streams: Sequence[StreamFacts], row_lengths: Sequence[int]) -> Figure:
    """Share of each stream's documents and tokens by length, a panel a stream, with the lengths of rows marked."""
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "grid": {"rows": len(streams), "columns": 1, "pattern": "coupled", "ygap": 0.35},
        "annotations": [],
    }
    for number, stream in enumerate(streams, 1):
        edges, documents, tokens = stream.lengths.coarse()
        suffix = "" if number == 1 else str(number)
        for counts, name, style in ((documents, "of documents", {"fill": "tozeroy"}), (tokens, "of tokens", {})):
            shares = (counts / max(1, counts.sum())).tolist()
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": edges.tolist(),
                    "y": [*shares, 0.0] if shares else [],
                    "yaxis": f"y{suffix}",
                    "name": name,
                    "legendgroup": name,
                    "showlegend": number == 1,
                    "line": {"shape": "hv", "width": 1.8, "color": PALETTE[0] if style else PALETTE[1]},
                    "hovertemplate": f"{stream.name}: %{{y:.1%}} {name}<br>from %{{x:,.0f}} tokens<extra></extra>",
                    **style,
                }
            )
        layout[f"yaxis{suffix}"] = {"tickformat": ".0%", "rangemode": "tozero", "nticks": 4, "title": {"text": stream.name}}
    layout["xaxis"] = {"type": "log", "title": {"text": "tokens of a document"}, "tickformat": "~s", "dtick": 1}
    layout["shapes"] = [
        {
            "type": "line",
            "x0": length,
            "x1": length,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": MARKED, "dash": "dot", "width": 1.5},
            "label": {"text": f"row {length:,}", "textposition": "end", "textangle": 0, "yanchor": "bottom"},
        }
        for length in row_lengths
    ]
    return figure(data, 120 * len(streams) + 110, **layout)


def rows(indexes: Sequence[IndexFigures]) -> Figure:
    """How full rows are, and how many of their ends lie at a border."""
    labels = [f"{split.name} · {index.sequence_length:,}" for index in indexes for split in index.streams]
    splits = [(index.sequence_length, split) for index in indexes for split in index.streams]
    filled = [split.tokens / max(1, split.rows * length) for length, split in splits]
    at_borders = [split.cuts_at_borders / split.cuts if split.cuts else None for _, split in splits]
    return _bars(
        labels,
        [("of a row is filled", PALETTE[0], filled), ("of rows end at a border", PALETTE[2], at_borders)],
        ".1%",
        bars=2,
        barmode="group",
        xaxis=_SHARES,
    )


def learned(streams: Sequence[StreamFacts]) -> Figure:
    series = [("loss weight a token", PALETTE[0], [stream.learned for stream in streams])]
    top = max([1.02, *(stream.learned for stream in streams)])  # weights may be greater than 1
    return _bars([s.name for s in streams], series, ".1%", xaxis=_SHARES | {"range": [0, top]}, showlegend=False)


def languages(samples: Sequence[StreamSample]) -> Figure:
    """Share of the sampled documents by language."""
    totals: dict[str, int] = {}
    for sample in samples:
        for code, figures in sample.languages.items():
            totals[code] = totals.get(code, 0) + figures.documents
    codes = sorted(totals, key=lambda code: (not code, -totals[code], code))
    series = []
    for number, code in enumerate(codes):
        shares = [
            (sample.languages[code].documents if code in sample.languages else 0) / max(1, sample.documents)
            for sample in samples
        ]
        series.append((code or UNKNOWN, PALETTE[number % len(PALETTE)] if code else "#9aa0aa", shares))
    names = [sample.name for sample in samples]
    return _bars(names, series, ".1%", barmode="stack", xaxis=_SHARES)


def fertility(found: Mapping[str, float], most: float) -> Figure:
    """Tokens a word by language, with the limit of waste marked."""
    plot = _bars(list(found), [("tokens a word", PALETTE[0], list(found.values()))], ".2f", showlegend=False)
    plot["layout"]["xaxis"]["range"] = [0, max([most * 1.15, *(value * 1.05 for value in found.values())])]
    plot["layout"]["shapes"] = [
        {
            "type": "line",
            "x0": most,
            "x1": most,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": MARKED, "dash": "dot", "width": 1.5},
            "label": {"text": f"waste from {most:g}", "textposition": "end", "textangle": 0, "yanchor": "bottom"},
        }
    ]
    plot["layout"]["margin"]["t"] = 24
    return plot


def cleaning(streams: Sequence[StreamFacts]) -> Figure:
    """Share of documents that each step changed; streams that are not cleaned have no bar."""
    steps = list(dict.fromkeys(step.step for stream in streams for step in stream.built.cleaned))
    names = [stream.name for stream in streams if stream.built.cleaned]
    series = []
    for number, step in enumerate(steps):
        shares: list[float | None] = []
        for stream in streams:
            if stream.built.cleaned:
                changed = [own.documents for own in stream.built.cleaned if own.step == step]
                read = stream.built.documents + stream.built.validation_documents + stream.built.dropped.get("empty", 0)
                shares.append(max(changed) / max(1, read) if changed else None)
        series.append((step, PALETTE[number % len(PALETTE)], shares))
    return _bars(names, series, ".1%", bars=len(steps), barmode="group", xaxis=_SHARES)


def cluster_sizes(sizes: Sequence[tuple[int, int]]) -> Figure:
    """How many clusters there are by how many documents went, in bins that double."""
    bins: dict[int, int] = {}
    for size, clusters in sizes:
        bins[size.bit_length() - 1] = bins.get(size.bit_length() - 1, 0) + clusters
    labels = [f"{2**own:,}" if own == 0 else f"{2**own:,} to {2 ** (own + 1) - 1:,}" for own in sorted(bins)]
    data = [
        {
            "type": "bar",
            "x": labels,
            "y": [bins[own] for own in sorted(bins)],
            "marker": {"color": PALETTE[1]},
            "hovertemplate": "%{y:,} documents stand for %{x} others each<extra></extra>",
        }
    ]
    axis = {"type": "log", "title": {"text": "clusters"}, "tickformat": "~s", "dtick": 1}
    return figure(data, 260, xaxis={"type": "category", "title": {"text": "documents that went"}}, yaxis=axis, showlegend=False)


def mix(parts: Sequence[MixPart], names: Sequence[str]) -> Figure:
    """Share of the tokens of each part of the run by stream."""
    series = [
        (name, PALETTE[number % len(PALETTE)], [part.tokens[name] / max(1, sum(part.tokens.values())) for part in parts])
        for number, name in enumerate(names)
    ]
    return _bars([part.name for part in parts], series, ".1%", barmode="stack", xaxis=_SHARES)


# --- forms ------------------------------------------------------------------------------------------------------------


def _outcomes(streams: Sequence[StreamFacts], counts: Sequence[Mapping[str, int]], unit: str) -> Figure:
    found = {outcome for own in counts for outcome, count in own.items() if count}
    series = [(name, color, [own.get(name, 0) for own in counts]) for name, color in OUTCOMES.items() if name in found]
    axis = {"title": {"text": unit}, "tickformat": "~s"}
    return _bars([stream.name for stream in streams], series, ",", barmode="stack", xaxis=axis)


def _bars(
    labels: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float | int | None]]],
    form: str,
    *,
    bars: int = 1,
    **layout: Any,
) -> Figure:
    """Horizontal bars, a label a line from the top; each series is its name, colour and values."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": list(labels),
            "x": list(values),
            "name": name,
            "marker": {"color": color},
            "hovertemplate": f"%{{y}}: %{{x:{form}}} {name}<extra></extra>",
        }
        for name, color, values in series
    ]
    names = {"autorange": "reversed", "type": "category", "ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
    height = len(labels) * (_BAR + 16 * (bars - 1)) + 96
    return figure(data, height, **{"bargap": 0.35, "xaxis": {}, **layout, "yaxis": names})
