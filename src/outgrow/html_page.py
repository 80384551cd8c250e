"""One HTML page that loads nothing: every text is escaped, and only the page's own two scripts may run.

The second guard is the page's security policy: it names the sha256 of the two scripts, so that a script which slipped through
would not run, and allows no address to be loaded from. What a report puts between head and foot is a Jinja template, which may
use ``plot(name)`` and ``table(rows, left)``. Colours of text, lines and background are the page's, which knows light from dark
and from paper; those of curves and bars stand on all three.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Figure: TypeAlias = dict[str, Any]
"""A plot as plotly takes it: ``data`` and ``layout``, plain values."""
Table: TypeAlias = list[tuple[str, ...]]
"""Rows of cells; the first row is the head."""

PALETTE = ("#4a86c5", "#d98a3d", "#55a388", "#b678b8", "#c9aa3c", "#c9605d", "#6cb3cf", "#8d83c9", "#9aa357", "#b08068")
MARKED = "#c9605d"
"""Colour of lines that mark a place in a plot."""

STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --ink: #1d2129; --soft: #5a6270; --rule: #dfe2e8;
  --learned: #d6ebd9; --learned-line: #4f9a63; --warn: #fdf3e0; --warn-line: #d98a3d; --good: #eaf5ee; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e6e9ef; --soft: #9aa4b2;
  --rule: #323945; --learned: #23452f; --learned-line: #6fbf86; --warn: #3a2e1c; --good: #1f3328; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 10px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 0 0 10px; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; }
code { font: 0.92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 24px 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 24px 26px; margin: 0 0 18px; }
.split { display: grid; grid-template-columns: 250px minmax(0, 1fr); gap: 28px; }
.split > div { min-width: 0; }
.advice { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px; }
.advice li { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 8px; padding: 10px 14px; }
.advice .do { display: block; color: var(--soft); font-size: 14px; }
.well { background: var(--good); border-left: 4px solid var(--learned-line); border-radius: 8px; padding: 10px 14px;
  margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 6px 0 4px; }
th { text-align: right; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--rule); padding: 5px 10px; }
td { text-align: right; border-bottom: 1px solid var(--rule); padding: 5px 10px; vertical-align: top; }
th.left, td.left { text-align: left; overflow-wrap: break-word; white-space: pre-line; }
th:first-child, td:first-child { padding-left: 0; }
tr:last-child td { border-bottom: 0; }
.plot { min-height: 60px; margin: 0 0 6px; }
.js-plotly-plot .main-svg { background: none !important; }
.js-plotly-plot text { fill: var(--ink) !important; }
.js-plotly-plot .hoverlayer text { fill: #ffffff !important; }
.js-plotly-plot .gridlayer path { stroke: var(--rule) !important; }
.js-plotly-plot .legend .bg { fill: none !important; }
.sample { border: 1px solid var(--rule); border-radius: 10px; margin: 10px 0; overflow: hidden; }
.sample header { display: flex; justify-content: space-between; gap: 12px; padding: 7px 12px; font-size: 13px;
  color: var(--soft); border-bottom: 1px solid var(--rule); }
.sample header span:first-child { overflow-wrap: anywhere; }
.text { margin: 0; padding: 12px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, "SF Mono", Menlo,
  Consolas, monospace; max-height: 420px; overflow-y: auto; unicode-bidi: isolate; }
.label { padding: 6px 12px 0; font-size: 12px; color: var(--soft); text-transform: uppercase; letter-spacing: 0.05em; }
mark { background: var(--learned); color: inherit; box-shadow: inset 0 -1.5px 0 var(--learned-line); }
mark.part { opacity: 0.75; }
.beginning { color: var(--soft); font-size: 12.5px; display: block; max-width: 60ch; unicode-bidi: isolate; }
@media (max-width: 820px) { .split { grid-template-columns: minmax(0, 1fr); gap: 10px; } main { padding: 24px 12px; }
  .card { padding: 18px 16px; } }
@media print {
  @page { margin: 14mm; }
  :root { --page: #ffffff; --card: #ffffff; --ink: #1d2129; --soft: #5a6270; --rule: #d5d9e0; --learned: #e3f2e6;
    --learned-line: #4f9a63; --warn: #fdf3e0; --good: #eaf5ee; color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } body, .advice .do { font-size: 11px; } h1 { font-size: 22px; } h2 { font-size: 15px; }
  h3, .tile b { font-size: 13px; } table, .note, .tile span, .sample header { font-size: 10px; } .text { font-size: 9.5px; }
  .beginning { font-size: 9px; } .tiles { grid-template-columns: repeat(7, 1fr); gap: 6px; } .tile { padding: 8px; }
  .card { border: 0; border-top: 1px solid var(--rule); border-radius: 0; padding: 14px 0; }
  .split { display: block; } .split > div:first-child { break-after: avoid; break-inside: avoid; }
  .sample, .plot, tr, .tile, .advice li { break-inside: avoid; } h2, h3 { break-after: avoid; } .text { max-height: none; }
}
"""

SCRIPT = """
(function () {
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var shown = [];
  Object.keys(figures).forEach(function (name) {
    var place = document.getElementById(name);
    Plotly.newPlot(place, figures[name].data, figures[name].layout, { displayModeBar: false, responsive: true });
    shown.push(place);
  });
  addEventListener("beforeprint", function () {
    shown.forEach(function (place) { Plotly.relayout(place, { width: 660, autosize: false }); });
  });
  addEventListener("afterprint", function () {
    shown.forEach(function (place) { Plotly.relayout(place, { width: null, autosize: true }); });
  });
})();
"""

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src {{ hashes }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{% macro plot(name) %}<div class="plot" id="{{ name }}"></div>{% endmacro %}
{% macro table(rows, left=(1,)) %}<div class="scroll"><table>
<thead><tr>{% for cell in rows[0] %}<th{% if loop.index in left %} class="left"{% endif %}>{{ cell }}</th>{% endfor %}\
</tr></thead>
<tbody>{% for row in rows[1:] %}<tr>{% for cell in row %}<td{% if loop.index in left %} class="left"{% endif %}>{{ cell }}</td>\
{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endmacro %}
"""

_FOOT = """</main>
<script type="application/json" id="figures">{{ figures }}</script>
<script>{{ plotly }}</script>
<script>{{ script }}</script>
</body>
</html>
"""


def render_page(title: str, body: str, figures: Mapping[str, Figure], **values: Any) -> str:
    """The page: ``body`` is a template that is given ``values``, ``figures`` are drawn into its plots of their names."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    plotly = str(get_plotlyjs())
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_HEAD + body + _FOOT)
    return page.render(
        **values,
        title=title,
        hashes=Markup(f"'sha256-{_sha256(plotly)}' 'sha256-{_sha256(SCRIPT)}'"),
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        plotly=Markup(plotly),
        figures=Markup(_json(figures)),
    )


def figure(data: Sequence[Figure], height: int, **layout: Any) -> Figure:
    """A plot of ``height`` pixels whose looks are those of the page; ``layout`` is plotly's, on top of that."""
    axes = {
        name: {"automargin": True, "fixedrange": True, "zeroline": False, **axis}
        | ({"title": {**axis["title"], "font": {"size": 13}}} if "title" in axis else {})
        for name, axis in layout.items()
        if name.startswith(("xaxis", "yaxis"))
    }
    return {
        "data": list(data),
        "layout": {
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
            "hoverlabel": {"bgcolor": "#20242c", "bordercolor": "#20242c", "font": {"color": "#ffffff"}},
            **layout,
            **axes,
        },
    }


def short(count: float) -> str:
    """A count in three figures, with its unit after a space."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:  # what rounds to 1,000 belongs to the next unit
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f} "


def visible(text: str) -> str:
    """The text with what would be invisible, or turn the direction of writing, spelled out."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else f"⟨U+{ord(char):04X}⟩"
        for char in text
    )


def _json(value: Any) -> str:
    """JSON that may stand within a script element: nothing in it can end one, and a browser reads all of it."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    return [_finite(own) for own in value] if isinstance(value, list | tuple) else value


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
