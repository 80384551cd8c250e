"""What the report of a run shows, in its order: a Jinja template, which escapes whatever is put in."""

from __future__ import annotations

BODY = """<h1>Run {{ name }}</h1>
<p class="soft">{{ state }}. Made {{ created }}, told until {{ until }} (UTC). Fingerprint <code>{{ fingerprint[:16] }}</code>.
Nothing of this page is loaded from anywhere.</p>
<noscript><p class="soft">Plots need JavaScript; the tables hold the same figures.</p></noscript>
<div class="tiles">{% for value, name in tiles %}<div class="tile"><b>{{ value }}</b><span>{{ name }}</span></div>\
{% endfor %}</div>
<p class="note">Drag in a plot to look closer; a double click shows all of it. Curves of more than {{ most_points }} points
are thinned: of each stretch its lowest and its highest stay. {% if restarts %}Dotted lines: the steps that restarts went on
from{% if undone %}; {{ undone }} logged steps that were trained again, or lost, are left out{% endif %}.{% endif %}</p>
{% if over_tokens %}<p class="note">The runs' steps are of different size: curves lie over tokens.</p>{% endif %}

<section class="card" id="look-first"><h2>Look at this first</h2>
{% if advice %}<ul class="advice">{% for item in advice %}<li>{{ item.says[:1] | upper }}{{ item.says[1:] }}.\
<span class="do">What to do: {{ item.do }}.</span></li>{% endfor %}</ul>
{% else %}<p class="well">Nothing stands out.</p>{% endif %}
</section>

{% if compared %}<section class="card" id="compared"><h2>Compared</h2>
{{ table(results) }}
<h3>What their recipes say otherwise</h3>
{% if keys|length > 1 %}{{ table(keys, all_left) }}{% else %}<p class="soft">Nothing: the recipes are the same.</p>{% endif %}
</section>{% endif %}

{% macro section(id, title) %}<section class="card split" id="{{ id }}-section"><div><h2>{{ title }}</h2>{{ caller() }}</div>
<div>{% endmacro %}
{% macro drawn(id, without) %}{% if id in drawn_plots %}{{ plot(id) }}{% else %}<p class="soft">{{ without }}</p>{% endif %}\
{% endmacro %}

{% call section("loss", "Loss") %}<p>Training loss of the logged steps, faint, with its running mean; dots: the loss on
held-out rows. The axis leaves out outliers.</p>
<p>Look for a validation loss that rises while the training loss falls.</p>{% endcall %}
{{ drawn("loss", "No step has been logged yet.") }}
{% if "streams" in drawn_plots %}<h3>Validation by stream</h3>{{ plot("streams") }}{% endif %}</div></section>

{% call section("rate", "Learning rate and gradient") %}<p>The learning rate, and the norm of the whole gradient before it is \
clipped.</p><p>Look for a norm that grows, or spikes with the loss.</p>{% endcall %}
<h3>Learning rate</h3>{{ drawn("learning_rate", "No step has been logged yet.") }}
<h3>Gradient norm</h3>{{ drawn("gradient_norm", "No step has been logged yet.") }}</div></section>

{% call section("throughput", "Throughput") %}<p>Valid tokens a second between logged steps, and the share that this is of
what the devices could do.</p><p>Look for steps down: another layout, a throttled card, data that come late.</p>{% endcall %}
<h3>Tokens a second</h3>{{ drawn("throughput", "No step has been logged yet.") }}
<h3>Model FLOPs utilisation</h3>{{ drawn("mfu", "Not known: the records of this run do not hold the FLOPs of a token, or what \
the devices could do.") }}</div></section>

{% call section("phases", "Phases") %}<p>Where the time of a step goes. Collectives are those that nothing overlaps.</p>
<p>Look for data wait, and for collectives that grow.</p>{% endcall %}
{{ drawn("phases", "Not known: the records of this run hold no seconds by phase.") }}
{% if phases|length > 1 %}{{ table(phases) }}{% endif %}</div></section>

{% call section("goodput", "Goodput") %}<p>Every second since the first start, counted once. Goodput is the share of finished \
steps and validations that count.</p><p>Look for recompute: steps that were done twice.</p>{% endcall %}
{{ drawn("goodput", "Not known: the records of this run hold no account of its time.") }}
{% if "wall" in drawn_plots %}{{ plot("wall") }}{{ table(wall) }}<p class="note">As the record of rank 0 accounts for it, \
at the last logged step.</p>{% endif %}</div></section>

{% call section("starts", "Starts") %}<p>Every start of the ranks, and what it cost.</p>{% endcall %}
{% if starts|length > 1 %}{{ table(starts, (1, 2)) }}{% if more_starts %}<p class="note">And {{ more_starts }} before \
these.</p>{% endif %}{% else %}<p class="soft">The run has not started yet.</p>{% endif %}</div></section>

{% call section("memory", "Memory") %}<p>What rank 0 holds: of the device's memory what is allocated, what is reserved and the \
peak; of RAM its own pages.</p>{% endcall %}
{{ drawn("memory", "Not known: the records of this run hold no memory.") }}
{% if memory|length > 1 %}{{ table(memory) }}{% endif %}
<p class="note">{{ memory_plan }}</p></div></section>

{% call section("tiers", "Tiers") %}<p>What reading shards through tiers has cost the node of rank 0.</p>
<p>Look for waiting, and for shards that are fetched again.</p>{% endcall %}
{% if tiers|length > 1 or cache|length > 1 %}
{% if "traffic" in drawn_plots %}<h3>Bytes a second by tier</h3>{{ plot("traffic") }}{% endif %}
{% if "cache" in drawn_plots %}<h3>Visits of shards</h3>{{ plot("cache") }}{% endif %}
{% if tiers|length > 1 %}{{ table(tiers) }}{% endif %}{% if cache|length > 1 %}{{ table(cache, ()) }}{% endif %}
{% else %}<p class="soft">Shards are read in place, through no tier; or the records do not tell.</p>{% endif %}</div></section>

{% call section("saves", "Checkpoints") %}<p>Seconds that each took. Only the copy holds up the loop; writing and the commit
go on behind it.</p>{% endcall %}
{{ drawn("saves", "None was made yet.") }}
{% if saves|length > 1 %}{{ table(saves, (6,)) }}<p class="note">{{ saves_note }}</p>{% endif %}</div></section>

{% call section("plan", "Plan and actual") %}<p>What <code>outgrow plan</code> said at the last start, and what came of \
it.</p>{% endcall %}
{{ table(plan) }}{% if not has_plan %}<p class="note">No plan is stored with this run: it was started before plans were \
kept.</p>{% else %}<p class="note">The plan names no time.</p>{% endif %}</div></section>

<section class="card long" id="samples-section"><h2>Samples</h2>
{% if samples %}<p>How the model continued each prompt, greedily, at validations along the way.</p>
{% for own in samples %}<article class="sample"><header><span>{{ own.prompt }}</span></header>
{% for step, text in own.texts %}<div class="label">{{ step }}</div><pre class="text" dir="auto">{{ text }}</pre>{% endfor %}
</article>{% endfor %}
{% else %}<p class="soft">None: <code>validation.prompts</code> of the recipe names texts to continue.</p>{% endif %}
</section>

{% call section("recipe", "Recipe and versions") %}<p>The recipe as it stands now, every default written out.</p>{% endcall %}
{% if versions|length > 1 %}{{ table(versions, (1, 2)) }}{% endif %}
<article class="sample"><header><span>recipe.yaml</span></header><pre class="text">{{ recipe }}</pre></article></div></section>
"""
