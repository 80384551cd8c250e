"""What the report of a dataset shows, in its order: a Jinja template, which escapes whatever is put in."""

from __future__ import annotations

BODY = """<h1>Data of {{ run }}</h1>
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
"""
