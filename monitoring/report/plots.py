"""The plots of a run's report, as plotly's plain figures. Curves are thinned; names that come from outside are plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from outgrow.contracts import StepRecord
from outgrow.html_page import MARKED, PALETTE, Figure, figure, visible
from outgrow.monitoring.recording.slots import PHASES, STAGES, WALL
from outgrow.monitoring.report.curves import Point, evenly, finite, merge, smooth, thin
from outgrow.monitoring.report.facts import Account, Ceiling, RunFacts, numbers

Read: TypeAlias = Callable[[StepRecord], float | None]

PHASE_COLORS: dict[str, str] = dict(
    zip(PHASES, ("#c9605d", "#4a86c5", "#6cb3cf", "#8d83c9", "#55a388", "#c9aa3c", "#b678b8"), strict=True)
)
WALL_COLORS: dict[str, str] = dict(
    zip(WALL, ("#55a388", "#6cb3cf", "#c9aa3c", "#8d83c9", "#d98a3d", "#c9605d", "#9aa0aa"), strict=True)
)
STAGE_COLORS: dict[str, str] = dict(zip(STAGES, ("#c9605d", "#4a86c5", "#55a388"), strict=True))
MOST_INTERVALS = 120
"""Stretches of a stacked plot at most: what lies between them is added up."""
MOST_ACCOUNTS = MOST_SAVES = 400
_HEIGHT = 300
_NAMED_RESTARTS = 5
"""Up to so many restarts are named in the plots; lines alone show more."""
_SMOOTHED_FROM = 50
"""Curves of fewer points are not smoothed."""
_LOG_FROM = 50.0
"""A gradient norm that spans more than this is shown on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is drawn together: the run that the report is of, others that it is compared with, and what all are drawn over."""

    run: RunFacts
    others: Sequence[RunFacts] = ()
    over_tokens: bool = False

    @property
    def runs(self) -> tuple[RunFacts, ...]:
        return (self.run, *self.others)

    def x(self, record: StepRecord) -> float:
        return float(record.tokens if self.over_tokens else record.step)

    @property
    def axis(self) -> dict[str, Any]:
        last = max((self.x(record) for run in self.runs for record in run.steps), default=1.0)
        title, form = ("tokens", "~s") if self.over_tokens else ("step", ",d")
        return {"title": {"text": title}, "tickformat": form, "range": [0, 1.01 * last], "fixedrange": False}


def figures(shown: Shown) -> dict[str, Figure]:
    """The plots by the id of their place in the page; those that would show nothing are left out."""
    run = shown.run
    found = {
        "loss": loss(shown),
        "streams": validation_by_stream(shown),
        "learning_rate": curve(shown, lambda record: record.learning_rate, tickformat=".1~e"),
        "gradient_norm": gradient_norm(shown),
        "throughput": curve(shown, lambda record: record.tokens_per_s, smoothed=True, tickformat="~s"),
        "mfu": mfu(shown),
        "phases": phases(run),
        "wall": wall(run),
        "goodput": goodput(run),
        "memory": memory(run),
        "traffic": traffic(run),
        "cache": cache(run),
        "saves": saves(run),
    }
    return {name: plot for name, plot in found.items() if plot is not None}


# --- what is learned --------------------------------------------------------------------------------------------------


def loss(shown: Shown) -> Figure | None:
    """Training loss, its running mean, and the validation loss, of every run."""
    data = []
    for number, run in enumerate(shown.runs):
        color = PALETTE[number % len(PALETTE)]
        training = finite((shown.x(own), own.loss) for own in run.steps)
        data += _raw_and_smooth(training, f"{label(run.name)} training" if shown.others else "training", color, smoothed=True)
        held_out = finite((shown.x(own), own.loss) for own in run.validations)
        name = f"{label(run.name)} validation" if shown.others else "validation"
        data += _line(held_out, name, color if shown.others else PALETTE[1], dash="dot", markers=True)
    highest = [own.loss for run in shown.runs for own in run.steps if own.loss is not None and math.isfinite(own.loss)]
    return _plot(shown, data, 380, {"title": {"text": "nats a token"}, **_without_outliers(highest)})


def validation_by_stream(shown: Shown) -> Figure | None:
    """None where there is one stream alone, whose loss is the validation loss."""
    run = shown.run
    names = list(dict.fromkeys(name for own in run.validations for name in numbers(own.detail.get("streams"))))
    if len(names) < 2:
        return None
    data = []
    for place, name in enumerate(names):
        points = finite((shown.x(own), numbers(own.detail.get("streams")).get(name)) for own in run.validations)
        data += _line(points, label(name), PALETTE[place % len(PALETTE)], markers=True)
    return _plot(shown, data, _HEIGHT, {"title": {"text": "nats a token"}})


def gradient_norm(shown: Shown) -> Figure | None:
    norms = [own.grad_norm for run in shown.runs for own in run.steps if own.grad_norm and math.isfinite(own.grad_norm)]
    wide = bool(norms) and max(norms) > _LOG_FROM * min(norms)
    axis = {"type": "log", "dtick": 1} if wide else {"rangemode": "tozero"}
    return curve(shown, lambda record: record.grad_norm, smoothed=True, **axis)


def mfu(shown: Shown) -> Figure | None:
    """Of the vendor's ceiling and of the measured one. Runs are compared by one of them, the vendor's where all have it."""
    curves: dict[Ceiling, list[list[Point]]] = {
        ceiling: [finite((shown.x(own), run.mfu(own, ceiling)) for own in run.steps) for run in shown.runs]
        for ceiling in ("vendor", "measured")
    }
    if shown.others:
        ceiling: Ceiling = "vendor" if all(curves["vendor"]) else "measured"
        curves = {ceiling: curves[ceiling]}
    data = []
    for place, (ceiling, found) in enumerate(curves.items()):
        for number, (run, points) in enumerate(zip(shown.runs, found, strict=True)):
            name = f"{label(run.name)} of {ceiling}" if shown.others else f"of {ceiling}"
            data += _raw_and_smooth(points, name, PALETTE[(place + number) % len(PALETTE)], smoothed=True)
    return _plot(shown, data, _HEIGHT, {"tickformat": ".2~%", "rangemode": "tozero"})


def curve(shown: Shown, read: Read, *, smoothed: bool = False, **axis: Any) -> Figure | None:
    """One value of the logged steps, of every run."""
    data = []
    for number, run in enumerate(shown.runs):
        points = finite((shown.x(own), read(own)) for own in run.steps)
        data += _raw_and_smooth(points, label(run.name), PALETTE[number % len(PALETTE)], smoothed=smoothed)
    return _plot(shown, data, _HEIGHT, {"rangemode": "tozero", **axis}, legend=bool(shown.others))


# --- where the time went ----------------------------------------------------------------------------------------------


def phases(run: RunFacts) -> Figure | None:
    """Seconds a step by phase; an interval that holds a restart counts all that was computed in it."""
    intervals = merge(run.phases, MOST_INTERVALS)
    shown = [phase for phase in PHASES if any(own.values.get(phase) for own in intervals)]
    return _stack(
        run,
        [float(own.step) for own in intervals],
        {phase: [own.values.get(phase, 0.0) / own.steps for own in intervals] for phase in shown},
        PHASE_COLORS,
        "seconds a step",
        "%{y:.3~g} s a step",
    )


def wall(run: RunFacts) -> Figure | None:
    """Seconds since the first start by what they went to, over the time of day."""
    if not run.accounts:
        return None
    nothing = Account(step=0, time=0.0, seconds={})
    accounts = [nothing, *(run.accounts[at] for at in evenly(len(run.accounts), MOST_ACCOUNTS))]
    size, unit = time_unit(accounts[-1].wall_s)
    kinds = [kind for kind in WALL if accounts[-1].seconds.get(kind)]
    data = _stacked(
        [own.wall_s / size for own in accounts],
        {kind: [own.seconds.get(kind, 0.0) / size for own in accounts] for kind in kinds},
        WALL_COLORS,
        f"%{{y:,.3~g}} {unit}",
    )
    axis = {"title": {"text": f"{unit} since the first start"}, "rangemode": "tozero"}
    return figure(data, _HEIGHT, xaxis=axis, yaxis={"title": {"text": unit}, "rangemode": "tozero"})


def goodput(run: RunFacts) -> Figure | None:
    """One bar of all the time there was, by what it went to."""
    if not run.accounts:
        return None
    account = run.accounts[-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [""],
            "x": [account.seconds[kind] / account.wall_s],
            "name": kind,
            "marker": {"color": WALL_COLORS[kind]},
            "hovertemplate": f"%{{x:.2%}} {kind}<extra></extra>",
        }
        for kind in WALL
        if account.seconds.get(kind) and account.wall_s
    ]
    axis = {"range": [0, 1], "tickformat": ".0%", "dtick": 0.2}
    return figure(data, 120, barmode="stack", bargap=0.3, xaxis=axis, yaxis={"showticklabels": False}) if data else None


# --- what it took -----------------------------------------------------------------------------------------------------


def memory(run: RunFacts) -> Figure | None:
    """Bytes by kind, of rank 0."""
    kinds = list(dict.fromkeys(kind for own in run.steps for kind in numbers(own.detail.get("memory"))))
    data = []
    for place, kind in enumerate(kinds):
        points = finite((float(own.step), numbers(own.detail.get("memory")).get(kind)) for own in run.steps)
        data += _line(points, label(kind), PALETTE[place % len(PALETTE)])
    axis = {"title": {"text": "bytes"}, "tickformat": "~s", "rangemode": "tozero"}
    return _plot(Shown(run=run), data, _HEIGHT, axis)


def traffic(run: RunFacts) -> Figure | None:
    """Bytes a second that were read of each tier on the node of rank 0."""
    intervals = merge(run.traffic, MOST_INTERVALS)
    names = list(dict.fromkeys(name for own in intervals for name in own.values if name.startswith("bytes.")))
    series = {
        label(name.removeprefix("bytes.")): [own.values.get(name, 0.0) / own.seconds for own in intervals] for name in names
    }
    colors = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(series)}
    x = [float(own.step) for own in intervals]
    return _stack(run, x, series, colors, "bytes a second", "%{y:.3~s}B/s", tickformat="~s")


def cache(run: RunFacts) -> Figure | None:
    """Visits of shards that lay on the first tier already, and that did not."""
    intervals = merge(run.traffic, MOST_INTERVALS)
    if not any(own.values.get("hits") or own.values.get("misses") for own in intervals):
        return None
    series = {name: [own.values.get(name, 0.0) for own in intervals] for name in ("hits", "misses")}
    colors = {"hits": PALETTE[2], "misses": PALETTE[5]}
    x = [float(own.step) for own in intervals]
    return _stack(run, x, series, colors, "visits of shards", "%{y:,}", tickformat=",d")


def saves(run: RunFacts) -> Figure | None:
    """Seconds of every checkpoint by stage, and crosses where one failed."""
    whole = [own for own in run.saves if not own.error]
    failed = [own for own in run.saves if own.error]
    kept = [whole[at] for at in evenly(len(whole), MOST_SAVES)]
    data: list[Figure] = [
        {
            "type": "bar",
            "x": [own.step for own in kept],
            "y": [getattr(own, f"{stage}_s") for own in kept],
            "name": {"copy": "copy (the loop waits)", "write": "write (behind)", "commit": "commit"}[stage],
            "marker": {"color": STAGE_COLORS[stage]},
            "width": _bar_width([own.step for own in kept], run),
            "hovertemplate": f"%{{y:.3~g}} s {stage}<extra>step %{{x:,}}</extra>",
        }
        for stage in STAGES
        if kept
    ]
    if failed:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [own.step for own in failed],
                "y": [0.0] * len(failed),
                "name": "failed",
                "cliponaxis": False,
                "marker": {"symbol": "x", "size": 11, "color": MARKED},
                "hovertemplate": "failed<extra>step %{x:,}</extra>",
            }
        )
    return _plot(Shown(run=run), data, _HEIGHT, {"title": {"text": "seconds"}, "rangemode": "tozero"}, barmode="stack")


# --- forms ------------------------------------------------------------------------------------------------------------


def label(text: str) -> str:
    """``text`` as plotly shows it letter by letter: to it, names are a little HTML, links and all."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit that suits a length of time: its seconds and its name."""
    for size, unit in ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * size:
            return size, unit
    return 1.0, "seconds"


def _raw_and_smooth(points: list[Point], name: str, color: str, *, smoothed: bool) -> list[Figure]:
    """The curve; where there are many points, faint behind its running mean."""
    if not smoothed or len(points) < _SMOOTHED_FROM:
        return _line(points, name, color)
    raw = _line(points, name, color, opacity=0.3, width=1.0, showlegend=False)
    return raw + _line(smooth(points), name, color, hoverinfo="skip", width=2.2)


def _line(
    points: Sequence[Point],
    name: str,
    color: str,
    *,
    dash: str = "solid",
    markers: bool = False,
    width: float = 1.8,
    **more: Any,
) -> list[Figure]:
    """The trace of a curve; none of no points. A single point is a dot."""
    kept = thin(points)
    if not kept:
        return []
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if markers or len(kept) == 1 else "lines",
        "x": [x for x, _ in kept],
        "y": [y for _, y in kept],
        "name": name,
        "legendgroup": name,
        "line": {"color": color, "width": width, "dash": dash},
        "marker": {"size": 5, "color": color},
        "hovertemplate": "%{y:.5~g} at %{x:,}<extra>%{fullData.name}</extra>",
    }
    if "hoverinfo" in more:
        del trace["hovertemplate"]
    return [trace | more]


def _stack(
    run: RunFacts,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
    unit: str,
    hover: str,
    **axis: Any,
) -> Figure | None:
    data = _stacked(x, series, colors, hover)
    return _plot(Shown(run=run), data, _HEIGHT, {"title": {"text": unit}, "rangemode": "tozero", **axis})


def _stacked(x: Sequence[float], series: Mapping[str, Sequence[float]], colors: Mapping[str, str], hover: str) -> list[Figure]:
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "one",
            "x": list(x),
            "y": list(values),
            "name": name,
            "line": {"width": 0.6, "color": colors[name]},
            "fillcolor": colors[name],
            "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>",
        }
        for name, values in series.items()
        if x
    ]


def _plot(
    shown: Shown, data: Iterable[Figure], height: int, yaxis: dict[str, Any], *, legend: bool = True, **layout: Any
) -> Figure | None:
    """A plot over steps with the run's restarts as lines; None of no curve."""
    traces = list(data)
    if not traces:
        return None
    shapes = [] if shown.over_tokens else _restarts(shown.run)
    margin = {"l": 8, "r": 16, "t": 24 if shapes else 8, "b": 8}
    if any("label" in shape for shape in shapes):  # above the names of the restarts
        layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02 + 22 / height, "yanchor": "bottom", "traceorder": "normal"}
    return figure(
        traces,
        height,
        xaxis=shown.axis,
        yaxis={"fixedrange": False, **yaxis},
        shapes=shapes,
        showlegend=legend,
        margin=margin,
        **layout,
    )


def _restarts(run: RunFacts) -> list[dict[str, Any]]:
    """A dotted line at every step that a restart went on from."""
    restarts = run.starts[1:]
    named = len(restarts) <= _NAMED_RESTARTS
    return [
        {
            "type": "line",
            "x0": start.step,
            "x1": start.step,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": MARKED, "dash": "dot", "width": 1.3},
        }
        | (
            {"label": {"text": label(cause(start.cause)), "textposition": "end", "textangle": 0, "yanchor": "bottom"}}
            if named
            else {}
        )
        for start in restarts
    ]


def cause(name: str) -> str:
    """A restart's cause in words."""
    return {"": "restart", "rank_lost": "rank lost", "asked": "asked for"}.get(name, name)


def _bar_width(steps: Sequence[int], run: RunFacts) -> float:
    """Steps that a bar takes: most of the way to the next one, and never so wide that a lone bar is a wall."""
    gaps = [later - earlier for earlier, later in zip(sorted(steps), sorted(steps)[1:], strict=False) if later > earlier]
    return max(0.1, min([0.7 * min(gaps, default=math.inf), max([0.02 * own.step for own in run.steps], default=1.0)]))


def _without_outliers(values: Sequence[float]) -> dict[str, Any]:
    """A range for the axis where the first steps or a spike would flatten all the rest; a double click still shows them."""
    if len(values) < _SMOOTHED_FROM:
        return {}
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 20]
    span = max(high - low, 1e-9)
    return {"range": [ordered[0] - 0.05 * span, high + span]} if ordered[-1] > high + 3 * span else {}
