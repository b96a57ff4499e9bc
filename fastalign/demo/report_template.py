"""The HTML of the report, a Jinja template; kept in a module so that it is installed with the rest."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastalign demo: DPO, length-penalised DPO and PPO</title>
<style>
:root { --ink: #1d2433; --soft: #5b6474; --line: #dfe3ea; --paper: #f5f6f9; --card: #fff;
        --right: #17803d; --wrong: #c02626; --filler: #8a92a0; --accent: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaf0; --soft: #a3acbb; --line: #333b49; --paper: #14181f; --card: #1c222c;
          --right: #5ccf86; --wrong: #ff8080; --filler: #8590a2; --accent: #6db3ee; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; }
p { margin: .6rem 0; max-width: 46rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
.verdict { font-size: 1.25rem; font-weight: 600; border-left: 4px solid var(--accent); padding-left: 1rem;
           margin: 1.6rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem;
        margin: 1rem 0; overflow-x: auto; }
.figure { background: #fff; }
.figure svg { width: 100%; height: auto; min-width: 40rem; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .87rem; }
dl.meanings { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .9rem 0 0;
              color: var(--soft); font-size: .87rem; }
dl.meanings dt { font-weight: 600; } dl.meanings dd { margin: 0; }
.examples td { white-space: normal; text-align: left; } .examples th, .examples td { vertical-align: top; }
.examples td.number { text-align: right; white-space: nowrap; }
.examples caption { text-align: left; font-weight: 600; padding: .3rem .7rem; }
.examples caption span { display: block; font-weight: 400; color: var(--soft); font-size: .87rem; }
.right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
.wrong { text-decoration: underline wavy 1px; text-underline-offset: 3px; } .filler { color: var(--filler); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .87rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.settings { columns: 3 14rem; margin: 0; padding: 0; list-style: none; font-size: .87rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .87rem; }
</style>
</head>
<body>
<main>
<h1>DPO, length-penalised DPO and PPO</h1>
<p class="lead">A model of a hundred thousand parameters, a language of a few dozen words, and annotators who like long
answers a little too much.</p>
<p class="verdict">{{ verdict }} {{ ppo_verdict }}</p>

<div class="card">
<table>
<thead><tr><th></th>{% for column in columns %}<th>{{ column.title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in rows %}
<tr><th>{{ name }}</th>{% for text in cells %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
<dl class="meanings">
{% for column in columns %}<dt>{{ column.title }}</dt><dd>{{ column.meaning }}</dd>
{% endfor %}
</dl>
</div>
<p>Means ± standard errors over the same questions for every model, one sampled answer each.</p>

<h2>During training</h2>
{% if svg is none %}
<p>No figure: matplotlib is not installed. With it (<code>pip install matplotlib</code>) the next run draws one.</p>
{% else %}
<div class="card figure">{{ svg }}</div>
<p>Bands are two standard errors wide on either side. In the plane of reward and KL a policy starts at the left, at the
SFT model, and ends at its large dot: further up is better, further right is more of a change.</p>
{% endif %}

<h2>What is going on</h2>
<p>A shopper asks for one to three details of an article. The <em>gold reward</em> of an answer is its right details
minus its wrong ones, over the details asked for; chatter neither gains nor loses anything. The SFT model has learned
from clerks who forget, err and chat by chance.</p>
<p>The annotators choose between two clerks' answers with log-odds
{{ gold_weight }} · (difference in gold reward) + {{ bias }} · (difference in length). They compared {{ pairs }} pairs:
the chosen answer is {{ "%.1f"|format(preferences.length_difference.mean) }} ±
{{ "%.1f"|format(preferences.length_difference.stderr) }} tokens longer than the rejected one on average, and of two
answers with equal gold rewards the longer one was chosen in
{{ "%.0f"|format(100 * preferences.longer_chosen_at_equal_gold.mean) }} ±
{{ "%.0f"|format(100 * preferences.longer_chosen_at_equal_gold.stderr) }} % of cases.</p>
<p>DPO fits these preferences, so that a habit of chatting, which the annotators reward, is learned as well as the
facts. R-DPO adds α(|y<sub>w</sub>| − |y<sub>l</sub>|) to the log-odds that it fits, here with α = {{ alpha }}: what
length explains of a preference need not be explained by the policy any more. In life nobody knows the annotators' bias,
and α is a setting to be tuned; here it is known, and the demonstration uses it unless it is told otherwise.</p>

<p>PPO goes another way. The annotators rank four clerks' answers to each of {{ rankings }} questions; a reward model
with the SFT model's trunk learns to score answers as they do, length included. The policy then samples its own answers
and is moved towards those that score more than its critic expected. A controller weighs a penalty on the KL to the SFT
model so that it stays near {{ target_kl }} nats an answer: chatter earns little for its KL, so there is hardly room
for it.</p>

<h2>Answers</h2>
<p>The first questions of the evaluation, not selected. <span class="right">Right</span>,
<span class="wrong">wrong</span>, <span class="filler">chatter</span>.</p>
{% for example in examples %}
<div class="card">
<table class="examples">
<caption>{{ example.prompt }}<span>Truth: {{ example.truth|join(" ") }}</span></caption>
<thead><tr><th></th><th></th><th>gold reward</th><th>tokens</th></tr></thead>
<tbody>
{% for name, sentences, gold, tokens in example.answers %}
<tr><th>{{ name }}</th>
<td>{% for sentence, verdict in sentences %}<span class="{{ verdict }}">{{ sentence }}</span> {% endfor %}</td>
<td class="number">{{ "%.2f"|format(gold) }}</td><td class="number">{{ tokens }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}

<h2>Next</h2>
<div class="card"><pre>{{ next_commands }}</pre></div>

<h2>How it was run</h2>
<div class="card"><ul class="settings">
{% for name, value in settings.items() %}<li><code>{{ name }}: {{ value }}</code></li>
{% endfor %}
</ul></div>
<p>{{ cache_line }} {{ "%.0f"|format(total_seconds) }} s on one core of a CPU:
{% for name, value in seconds.items() %}{{ name }} {{ "%.0f"|format(value) }} s{{ ", " if not loop.last else "." }}
{% endfor %}</p>
<footer>fastalign, {% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}
{% endfor %}· the figures are in results.json beside this file</footer>
</main>
</body>
</html>
"""
