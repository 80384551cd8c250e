"""The page of a report: its structure as a Jinja template (which escapes whatever is put in), its style, and its one script."""

from __future__ import annotations

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

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src {{ hashes }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data of {{ run }}</title>
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
<h1>Data of {{ run }}</h1>
<p class="soft">Dataset <code>{{ dataset }}</code>. Everything here is of the dataset as it is trained on, after cleaning, \
choice and rendering; nothing of this page is loaded from anywhere.</p>
<noscript><p class="soft">Plots need JavaScript; the tables hold the same figures.</p></noscript>
<div class="tiles">{% for value, name in tiles %}<div class="tile"><b>{{ value }}</b><span>{{ name }}</span></div>\
{% endfor %}</div>

<section class="card" id="look-first"><h2>Look at this first</h2>
{% if advice %}<ul class="advice">{% for item in advice %}<li>{{ item.says[:1] | upper }}{{ item.says[1:] }}.\
<span class="do">What to do: {{ item.do }}.</span></li>{% endfor %}</ul>
{% else %}<p class="well">Nothing stands out: no language wastes tokens, rows are full, and no stream loses many documents.\
</p>{% endif %}
</section>

<section class="card split"><div><h2>What there is</h2>
<p>Each bar is a stream: what is trained on, what is held out for validation, and what is in no row, by reason.</p>
<p>Look for a stream that loses more than you expect, and for one that is far smaller than it should be.</p></div>
<div><h3>Tokens</h3>{{ plot("tokens") }}<h3>Documents</h3>{{ plot("documents") }}{{ table(streams, (1, 2)) }}
<p class="note">What the build left out (empty, malformed and the like) never became tokens: it is counted in documents \
alone.</p>
</div></section>

{% if drops|length > 1 %}<section class="card long split"><div><h2>What was dropped</h2>
<p>Every document that is in no row, by reason, with some of them named.</p>
<p>All of them: <code>outgrow data dropped RECIPE --stream S --reason R</code></p></div>
<div>{{ table(drops, (1, 2, 5)) }}</div></section>{% endif %}

<section class="card split"><div><h2>Lengths</h2>
<p>How long the documents are that are trained on. Filled: share of the documents; line: share of the tokens, which is what \
training sees. Dotted: the length of a row.</p>
<p>Look for documents far beyond the dotted line: they are divided into many rows. Where <code>split: never</code>, all \
should lie before it.</p></div>
<div>{{ plot("lengths") }}{{ table(lengths) }}<p class="note">Quantiles are exact to 4.4%.</p></div></section>

<section class="card split"><div><h2>Rows</h2>
<p>How much of a row holds tokens, and how many rows end where a sentence, turn or document does.</p>
<p>Look for rows that are not full: the rest is computed in vain. A row that ends within a sentence costs nothing but a little \
sense.</p></div>
<div>{{ plot("rows") }}{{ table(rows) }}<p class="note">The bound is the fewest rows that any way of laying the documents \
needs.</p></div></section>

<section class="card split"><div><h2>The mix</h2>
<p>Which share of its tokens a part of the run takes from each stream, and how often it reads a stream.</p>
<p>Look for a stream that is read more than four times: from then on it is learned by heart rather than understood.</p></div>
<div>{{ plot("mix") }}{{ table(mix) }}
<p class="note">Share of the tokens, and how many times the stream is read.</p></div></section>

<section class="card split"><div><h2>Languages</h2>
<p>The language of sampled documents, told from their beginnings.</p>
<p>Look for languages that you did not put there. Short texts, code and markup are often not known.</p></div>
<div>{{ plot("languages") }}{{ table(languages, (1, 2)) }}<p class="note">{{ sampled }}</p></div></section>

<section class="card split"><div><h2>Tokens a word</h2>
<p>How many tokens the tokenizer takes for a word of prose: what every row, every step and every answer costs.</p>
<p>Look for bars beyond the dotted line: the tokenizer does not know that language.</p></div>
<div>{% if has_fertility %}{{ plot("fertility") }}{% else %}<p class="soft">There is too little prose in the sample to \
tell.</p>{% endif %}{{ table(fertility) }}
<p class="note">Prose: texts of at least 85% letters and spaces; words are divided by spaces. Special tokens do not count.</p>
</div></section>

<section class="card split"><div><h2>What is learned</h2>
<p>Loss weight a token: the share of tokens that the model learns to write, where weights are 0 and 1.</p>
<p>Look for dialogues near 100%: then questions are learned too. Near 0: nothing is.</p></div>
<div>{{ plot("learned") }}</div></section>

<section class="card long split"><div><h2>Duplicates</h2>
<p>Documents that went for being like one that stayed.</p>
<p>Look for big clusters: a template, a licence, a page that was downloaded again and again. A held-out one with many is a \
leak that was closed.</p></div>
<div>{% if clusters %}{{ plot("clusters") }}<div class="scroll"><table><thead><tr><th class="left">stayed</th><th>went</th>\
<th class="left">why</th><th class="left">among them</th></tr></thead><tbody>
{% for own in clusters %}<tr><td class="left"><code>{{ own.kept }}</code> in {{ own.kept_stream }}\
{% if own.held_out %}, held out{% endif %}<span class="beginning">{{ own.beginning }}</span></td><td>{{ own.size }}</td>\
<td class="left">{{ own.why }}</td><td class="left">{{ own.examples }}</td></tr>{% endfor %}</tbody></table></div>
{% else %}<p class="soft">{{ no_clusters }}</p>{% endif %}</div></section>

<section class="card split"><div><h2>Cleaning</h2>
<p>Share of the documents that each step changed, and how many changes it made.</p>
<p>Look for a step that changes nothing, and for one that changes far more than you would by hand.</p></div>
<div>{% if cleaning|length > 1 %}{{ plot("cleaning") }}{{ table(cleaning, (1, 2)) }}{% else %}
<p class="soft">No stream is cleaned.</p>{% endif %}</div></section>

<section class="card long"><h2>Samples</h2>
<p>Some documents of each stream, decoded from their tokens. Of those that are \
learned in part, <mark>marked</mark> is what is learned. Special tokens are shown as they are.</p>
{% for stream in samples %}<h3>{{ stream.name }}</h3>
{% for own in stream.shown %}<article class="sample"><header><span>{{ own.source }}</span><span>{{ own.note }}</span></header>
{% for label, pieces in own.parts %}{% if label %}<div class="label">{{ label }}</div>{% endif %}
<pre class="text" dir="auto">{% for piece in pieces %}{% if piece.weight and not own.all_learned %}\
<mark{% if piece.weight != 1 %} class="part" title="loss weight {{ '%g' % piece.weight }}"{% endif %}>{{ piece.text }}</mark>\
{% else %}{{ piece.text }}{% endif %}{% endfor %}</pre>
{% endfor %}</article>{% endfor %}{% endfor %}
</section>
</main>
<script type="application/json" id="figures">{{ figures }}</script>
<script>{{ plotly }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
