"""Every mistake in a recipe or site must give exactly this message: file:line, key path, what was given, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from outgrow.errors import RecipeError, SiteError
from outgrow.recipes.loading import load
from outgrow.recipes.site_loading import load_site

RECIPE = """\
schema: 1
run:
  name: tiny
  seed: 7
model:
  kind: architecture
  family: llama
  config: {hidden_size: 64}
data:
  sequence_length: 128
  tokenizer:
    kind: train
    vocab_size: 300
  streams:
    - name: code
      source:
        kind: text
        path: corpus
batch:
  rows: 8
duration:
  steps: 5
optimizer:
  learning_rate: 1e-3
"""

# What is replaced in RECIPE, by what, and the message; FILE stands for the path of the file.
RECIPE_MISTAKES = [
    ("schema: 1\n", "", "FILE:1: schema: missing; allowed: 1"),
    ("schema: 1", "schema: 2", "FILE:1: schema: given 2; allowed: 1"),
    ("name: tiny", "name: My Run", "FILE:3: run.name: given 'My Run'; allowed: lower-case letters, digits, - and _"),
    ("seed: 7", "seed: -1", "FILE:4: run.seed: given -1; allowed: a whole number, at least 0 and below 4294967296"),
    ("seed: 7", "seed: '7'", "FILE:4: run.seed: given '7'; allowed: a whole number, at least 0 and below 4294967296"),
    ("seed: 7", "seed: yes", "FILE:4: run.seed: given 'yes'; allowed: a whole number, at least 0 and below 4294967296"),
    (
        "seed: 7",
        "seeds: 7",
        "FILE:2: run.seed: missing; allowed: a whole number, at least 0 and below 4294967296\n"
        "FILE:4: run.seeds: unknown key; did you mean seed?",
    ),
    ("  kind: architecture\n", "", "FILE:5: model.kind: missing; allowed: architecture | folder | custom"),
    (
        "kind: architecture",
        "kind: architectur",
        "FILE:6: model.kind: given 'architectur'; allowed: architecture | folder | custom; did you mean architecture?",
    ),
    (
        "  family: llama",
        "  family: llama\n  path: x",
        "FILE:8: model.path: unknown key for this kind; it belongs to kind: folder",
    ),
    (
        "{hidden_size: 64}",
        "{vocab_size: 64}",
        "FILE:8: model.config.vocab_size: remove it; the vocabulary size comes from data.tokenizer",
    ),
    ("{hidden_size: 64}", "64", "FILE:8: model.config: given 64; allowed: key: value pairs"),
    (
        "sequence_length: 128",
        "sequence_length: 128.5",
        "FILE:10: data.sequence_length: given 128.5; allowed: a whole number, at least 8 and at most 1048576",
    ),
    (
        "sequence_length: 128",
        "sequence_length:",
        "FILE:10: data.sequence_length: given nothing; allowed: a whole number, at least 8 and at most 1048576",
    ),
    (
        "vocab_size: 300",
        "vocab_size: 100",
        "FILE:13: data.tokenizer.vocab_size: given 100; allowed: a whole number, at least 260 and at most 1000000",
    ),
    (
        "kind: text",
        "kind: txt",
        "FILE:17: data.streams[0].source.kind: given 'txt'; "
        "allowed: text | markdown | jsonl | json | parquet | epub | fb2 | docx | pdf | transcript | yaml | mds | custom; "
        "did you mean text?",
    ),
    (
        "path: corpus",
        "path: /data/corpus",
        "FILE:18: data.streams[0].source.path: '/data/corpus' holds on one machine alone; "
        "give a name here, and its folder under sources: in site.yaml",
    ),
    (
        "path: corpus",
        "path: s3://bucket/x",
        "FILE:18: data.streams[0].source.path: 's3://bucket/x' holds on one machine alone; "
        "give a name here, and its folder under sources: in site.yaml",
    ),
    (
        "path: corpus",
        "path: '${env:CORPUS}'",
        "FILE:18: data.streams[0].source.path: ${env:...} is for site.yaml alone; write the value",
    ),
    (
        "path: corpus",
        "path: corpus\n        records: a",
        "FILE:19: data.streams[0].source.records: unknown key for this kind; it belongs to kind: json | yaml",
    ),
    (
        "path: corpus",
        "path: corpus\n        include: '*.py'",
        "FILE:19: data.streams[0].source.include: given '*.py'; allowed: a list of texts",
    ),
    (
        "path: corpus",
        "path: corpus\n    - name: code\n      source: {kind: text, path: more}",
        "FILE:19: data.streams[1].name: 'code' is given twice; each stream needs a name of its own",
    ),
    ("rows: 8", "rows: 0", "FILE:20: batch.rows: given 0; allowed: a whole number, at least 1"),
    ("rows: 8", "rows: true", "FILE:20: batch.rows: given true; allowed: a whole number, at least 1"),
    ("rows: 8", "rows: 8\n  micro_rows: 9", "FILE:21: batch.micro_rows: 9 is more than batch.rows (8); lower it"),
    (
        "rows: 8",
        "rows: 8\n  micro_rows: all",
        "FILE:21: batch.micro_rows: given 'all'; allowed: auto or a whole number, at least 1",
    ),
    ("rows: 8", "rows: 8\n  rows: 9", "FILE:21: batch.rows: given twice; first on line 20"),
    (
        "steps: 5",
        "steps: 5\n  tokens: 9",
        "FILE:21: duration: given steps and tokens; allowed: exactly one of steps, tokens, epochs",
    ),
    ("steps: 5", "epochs: 0", "FILE:22: duration.epochs: given 0; allowed: a number, above 0"),
    (
        "learning_rate: 1e-3",
        "learning_rat: 1e-3",
        "FILE:23: optimizer.learning_rate: missing; allowed: a number, above 0\n"
        "FILE:24: optimizer.learning_rat: unknown key; did you mean learning_rate?",
    ),
    (
        "learning_rate: 1e-3",
        "learning_rate: .inf",
        "FILE:24: optimizer.learning_rate: given '.inf'; allowed: a number, above 0",
    ),
    (
        "learning_rate: 1e-3",
        "learning_rate: 1e999",
        "FILE:24: optimizer.learning_rate: '1e999' is not a value that can be used",
    ),
    (
        "learning_rate: 1e-3",
        "learning_rate: 1e-3\n  betas: [0.9, 1]",
        "FILE:25: optimizer.betas: given [0.9, 1.0]; allowed: two numbers, each at least 0 and below 1",
    ),
    (
        "learning_rate: 1e-3",
        "learning_rate: 1e-3\n  betas: [0.9]",
        "FILE:25: optimizer.betas: given [0.9]; allowed: a list of 2 numbers",
    ),
    (
        "optimizer:",
        "precision: fp23\noptimizer:",
        "FILE:23: precision: given 'fp23'; allowed: fp32 | fp64 | bf16; did you mean fp32?",
    ),
    (
        "optimizer:",
        "precision: fp16\noptimizer:",
        "FILE:23: precision: given 'fp16'; allowed: fp32 | fp64 | bf16; did you mean bf16, which has the range of fp32?",
    ),
    (
        "optimizer:",
        "adapter: qlora\noptimizer:",
        "FILE:23: adapter.kind: given 'qlora'; allowed: none | lora; did you mean {kind: lora, base: nf4}?",
    ),
    (
        "path: corpus\n",
        "path: corpus\n  validation_fraction: 0\nvalidation: {on_rise: {kind: stop, rise: 0.1}}\n",
        "FILE:20: validation.on_rise: no document is held out to see a rise by; raise data.validation_fraction",
    ),
    (
        "optimizer:",
        "parallel: fsdp\noptimizer:",
        "FILE:23: parallel.kind: given 'fsdp'; allowed: auto | ddp | fsdp2 | zero; did you mean fsdp2?",
    ),
    (
        "optimizer:",
        "parallel: {kind: fsdp2, shard: 0}\noptimizer:",
        "FILE:23: parallel.shard: given 0; allowed: all | node or a whole number, at least 1",
    ),
    (
        "optimizer:",
        "schedule: {kind: custom, factory: mine}\noptimizer:",
        "FILE:23: schedule.factory: given 'mine'; allowed: package.module:function",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      clean: [nfc, hyphenaton]\n",
        "FILE:19: data.streams[0].clean[1].kind: given 'hyphenaton'; allowed: nfc | control_characters | hyphenation | "
        "line_joins | filler_words | time_codes | look_alikes | custom; did you mean hyphenation?",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      tag: book\n",
        "FILE:19: data.streams[0].tag: given 'book'; allowed: a token that begins every document, such as <YAML>",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      epochs: 2\n      share: 0.5\n",
        "FILE:20: data.streams[0].share: given beside epochs; allowed: one of epochs and share",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      share: 0.5\n",
        "FILE:19: data.streams[0].share: all streams have a share, and they add up to 0.5; allowed: 1",
    ),
    (  # 0.7 + 0.2 + 0.1 is a little less than 1 in floats
        "        path: corpus\n",
        "        path: corpus\n"
        + "".join(
            f"    - {{name: {name}, source: {{kind: text, path: {name}}}, share: {share}}}\n"
            for name, share in (("a", 0.7), ("b", 0.2), ("c", 0.1))
        ),
        "FILE:21: data.streams[3].share: shares add up to 1 and leave nothing for the other streams; lower it",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      too_long: drop\n",
        "FILE:19: data.streams[0].too_long: drop is for split: never; documents are split already",
    ),
    (
        "kind: text\n        path: corpus\n",
        "kind: jsonl\n        shape: preference\n        path: corpus\n      split: never\n      too_long: split\n",
        "FILE:21: data.streams[0].too_long: a preference pair cannot be split; allowed: stop, drop",
    ),
    (
        "kind: text\n        path: corpus\n",
        "kind: jsonl\n        shape: preference\n        path: corpus\n",
        "FILE:15: data.streams[0].split: a preference pair stays in one row; set split: never",
    ),
    (
        "kind: text\n        path: corpus\n",
        "kind: mds\n        path: corpus\n      tag: <X>\n",
        "FILE:19: data.streams[0].tag: a source of token ids holds no text to work on; remove it",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      filter: {min_chars: 9, max_chars: 3}\n",
        "FILE:19: data.streams[0].filter.max_chars: 3 is less than min_chars (9); raise it, or set 0 for no limit",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n      filter: {languages: [ru, rus]}\n",
        "FILE:19: data.streams[0].filter.languages[1]: given 'rus'; "
        "allowed: ISO 639-1 codes of two lower-case letters, such as ru",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n  stages:\n    - {shares: {code: 0.5}}\n",
        "FILE:20: data.stages[0].shares: they add up to 0.5; allowed: 1",
    ),
    (
        "        path: corpus\n",
        "        path: corpus\n  stages:\n    - {shares: {cod: 1}}\n    - {shares: {code: 1}, tokens: 5}\n",
        "FILE:20: data.stages[0].tokens: every stage but the last needs it\n"
        "FILE:20: data.stages[0].shares.cod: there is no stream 'cod'; streams: code\n"
        "FILE:21: data.stages[1].tokens: the last stage lasts to the end of the run; remove it",
    ),
    (
        "        path: corpus\nbatch:\n  rows: 8\nduration:\n  steps: 5\n",
        "        path: corpus\n  stages:\n    - {shares: {code: 1}}\nbatch:\n  rows: 8\nduration:\n  epochs: 5\n",
        "FILE:24: duration.epochs: a run in stages has no epochs; give duration.tokens or duration.steps",
    ),
    ("optimizer:", "warmup_steps: 3\noptimizer:", "FILE:23: warmup_steps: unknown key; did you mean schedule.warmup_steps?"),
    (
        "optimizer:",
        "gpus: 8\noptimizer:",
        "FILE:23: gpus: unknown key; allowed: schema, run, model, adapter, data, objective, batch, "
        "duration, optimizer, schedule, precision, attention, cross_entropy, compile, "
        "activation_checkpointing, activation_offload, deterministic, validation, checkpoint, logging, "
        "profile, parallel",
    ),
    (
        "optimizer:",
        "checkpoint: &c {every_steps: 5}\nvalidation: *c\noptimizer:",
        "FILE:24: not valid YAML: aliases (*name) are not used here",
    ),
    (
        "optimizer:",
        "logging: !!python/object/apply:os.abort []\noptimizer:",
        "FILE:23: logging: the tag !!python/object/apply:os.abort is not allowed; write plain values",
    ),
    ("optimizer:", "7: x\noptimizer:", "FILE:23: the key '7' is not text; put it in quotes"),
    ("optimizer:", "batch: [\noptimizer:", "FILE:25: not valid YAML: expected ',' or ']', but got ':'"),
    (
        "optimizer:",
        "--- \noptimizer:",
        "FILE:23: not valid YAML: expected a single document in the stream, but found another document",
    ),
    (RECIPE, "", "FILE: the file is empty; allowed: a mapping of key: value"),
    (RECIPE, "- a\n", "FILE: the file holds a list or a single value; allowed: a mapping of key: value"),
    (RECIPE, "[" * 1000, "FILE: not valid YAML: nested too deeply"),
    ("{hidden_size: 64}", "{a: " * 60 + "1" + "}" * 60, "FILE:8: model: nested more than 50 deep"),
]

OVERRIDE_MISTAKES = [
    ("batch.rows", "override 'batch.rows': allowed: key.path=value, such as batch.rows=8"),
    ("=3", "override '=3': allowed: key.path=value, such as batch.rows=8"),
    ("batch.rows=x", "override 'batch.rows=x': batch.rows: given 'x'; allowed: a whole number, at least 1"),
    ("batch.rows=", "override 'batch.rows=': batch.rows: given nothing; allowed: a whole number, at least 1"),
    ("batch.row=4", "override 'batch.row=4': batch.row: unknown key; did you mean rows?"),
    ("optimiser.eps=1", "override 'optimiser.eps=1': optimiser: unknown key; did you mean optimizer?"),
    ("batch=[", "override 'batch=[': not valid YAML: expected the node content, but found '<stream end>'"),
    (
        "data.streams[3].name=x",
        "override 'data.streams[3].name=x': data.streams[3].name: data.streams holds 1; allowed: an index below 1",
    ),
    (
        "data.streams.0.source.kind=hf",
        "override 'data.streams.0.source.kind=hf': data.streams[0].source.kind: given 'hf'; "
        "allowed: text | markdown | jsonl | json | parquet | epub | fb2 | docx | pdf | transcript | yaml | mds | custom",
    ),
    ("duration.epochs=2", "FILE:21: duration: given steps and epochs; allowed: exactly one of steps, tokens, epochs"),
    (
        "duration={epochs: 2, steps: 3}",
        "override 'duration={epochs: 2, steps: 3}': duration: given steps and epochs; allowed: "
        "exactly one of steps, tokens, epochs",
    ),
    ("data.streams=[]", "override 'data.streams=[]': data.streams: given []; allowed: a list of items that is not empty"),
]

SITE_MISTAKES = [
    ("storge: /data", "FILE:1: storge: unknown key; did you mean storage?"),
    ("storage: 3", "FILE:1: storage: given 3; allowed: text"),
    ("storage: ${HOME}/x", "FILE:1: storage: ${HOME} is not known; allowed: ${env:HOME}"),
    ("storage: ${env:OUTGROW_NOT_SET}/x", "FILE:1: storage: the environment variable OUTGROW_NOT_SET is not set"),
    ("storage: '${env:HOME'", "FILE:1: storage: '${' is not closed; allowed: ${env:NAME}"),
    ("schema: 1\nworkers: 0", "FILE:2: workers: given 0; allowed: auto or a whole number, at least 1"),
    ("cache: s3://bucket/x", "FILE:1: cache: given 's3://bucket/x'; allowed: a local folder"),
    ("device: gpu", "FILE:1: device: given 'gpu'; allowed: auto | cpu | cuda"),
    ("device: ${env:HOME}", "FILE:1: device: ${env:NAME} is for folders and secrets alone; write the value"),
    ("cluster:\n  adress: auto", "FILE:2: cluster.adress: unknown key; did you mean address?"),
    ("address: head:6379", "FILE:1: address: unknown key; did you mean cluster.address or monitoring.address?"),
    (
        "storage_options:\n  key: AKIA1234",
        "FILE:2: storage_options.key: a secret does not stand in a file; write ${env:NAME} and set NAME in the environment",
    ),
    (
        "storage_options:\n  client_kwargs: {a: b}",
        'FILE:2: storage_options.client_kwargs: given {"a": "b"}; allowed: text or a whole number or true or false',
    ),
    ("tiers:\n- {name: nvme}", "FILE:2: tiers[0].path: missing; allowed: text"),
    (
        "tiers: [{name: a, path: /a, capacity: 500}]",
        "FILE:1: tiers[0].capacity: given 500; allowed: auto or a size such as 500 GB",
    ),
    (
        "tiers: [{name: a, path: /a, capacity: 500 gb}]",
        "FILE:1: tiers[0].capacity: given '500 gb'; allowed: auto or a size such as 500 GB",
    ),
    (
        "tiers: [{name: a, path: /a, speed: fast}]",
        "FILE:1: tiers[0].speed: given 'fast'; allowed: auto or a rate such as 180 MB/s or 100 Mbit/s",
    ),
    (
        "tiers: [{name: a/b, path: /a}]",
        "FILE:1: tiers[0].name: given 'a/b'; allowed: small letters, digits, - and _, at most 32, such as nvme",
    ),
    (
        "tiers: [{name: s3, path: 's3://bucket'}]",
        "FILE:1: tiers[0].path: given 's3://bucket'; the first tier holds what is read next: a folder on a fast disk",
    ),
    (
        "tiers:\n- {name: a, path: /a}\n- {name: a, path: /b}",
        "FILE:3: tiers[1].name: 'a' is given twice; each tier needs a name of its own",
    ),
    (
        "tiers:\n- {name: a, path: /a}\n- {name: b, path: /b, run_cache: 5 GB}",
        "FILE:3: tiers[1].run_cache: given '5 GB'; only the first tier keeps copied shards for runs",
    ),
    (
        "tiers:\n- {name: a, path: /a}\n- {name: b, path: /a/b}",
        "FILE:3: tiers[1].path: '/a/b' and tiers[0].path lie within one another",
    ),
    (
        "tiers: [{name: a, path: /a}]\nplace: {datasets: [b]}",
        "FILE:2: place.datasets[0]: there is no tier 'b'; tiers: a",
    ),
    (
        "tiers: [{name: a, path: /a, options: {secret: hunter2}}]",
        "FILE:1: tiers[0].options.secret: a secret does not stand in a file; write ${env:NAME} and set NAME in the environment",
    ),
    ("sources: [a]", 'FILE:1: sources: given ["a"]; allowed: key: value pairs'),
    ("sources:\n  a: /x\n  a: /y", "FILE:3: sources.a: given twice; first on line 2"),
]


def recipe_message(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("old", "new", "message"), RECIPE_MISTAKES, ids=[re.sub(r"\W+", " ", m)[:60] for _, _, m in RECIPE_MISTAKES]
)
def test_recipe_mistake(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert RECIPE.count(old) == 1
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new))
    assert recipe_message(path) == message


@pytest.mark.parametrize(("override", "message"), OVERRIDE_MISTAKES)
def test_override_mistake(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert recipe_message(path, override) == message


@pytest.mark.parametrize(("text", "message"), SITE_MISTAKES)
def test_site_mistake(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(SiteError) as caught:
        load_site(path)
    assert str(caught.value).replace(str(path), "FILE") == message


def test_all_mistakes_are_shown_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.replace("seed: 7", "seed: x").replace("rows: 8", "rows: 8\n  row: 9").replace("kind: text", "kind: t")
    )
    lines = recipe_message(path, "precision=half", "no").splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "FILE:4",
        "FILE:17",
        "FILE:21",
        "override 'precision=half'",
        "override 'no'",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"schema: 1\xff"), "is not UTF-8 text (byte 9)"),
    ],
)
def test_file_that_cannot_be_read(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(path := tmp_path / "recipe.yaml")
    assert recipe_message(path) == f"FILE: {message}"


def test_secret_in_clear_is_not_repeated_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("storage_options: {secret: hunter2}")
    with pytest.raises(SiteError) as caught:
        load_site(path)
    assert "hunter2" not in str(caught.value)
