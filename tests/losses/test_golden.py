"""Golden losses: text, tokenizer, token store, rows, model and optimizer together give the losses that they gave before.

A change of the arithmetic shows here. Where it is meant, write the file anew and say why in docs/decisions.md:

    python tests/losses/test_golden.py
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("llama_fp32.json")
STEPS = 20
SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "tu")
RECIPE = {
    "schema": 1,
    "run": {"name": "golden", "seed": 11},
    "model": {
        "kind": "architecture",
        "family": "llama",
        "config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    },
    "data": {
        "sequence_length": 64,
        "tokenizer": {"kind": "train", "vocab_size": 320},
        "streams": [
            {"name": "prose", "source": {"kind": "text", "path": "prose"}},
            {"name": "lists", "source": {"kind": "jsonl", "path": "lists"}},
        ],
        "validation_fraction": 0.1,
        "loader_workers": 0,
    },
    "batch": {"rows": 6, "micro_rows": 4},
    "duration": {"steps": STEPS},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01},
    "schedule": {"kind": "cosine", "warmup_steps": 4},
    "precision": "fp32",
    "logging": {"every_steps": 1},
}


def write_corpus(folder: Path) -> None:
    """Words of a made-up language, each the likelier the shorter; the same bytes on every machine."""
    draw = random.Random(3)
    words = ["".join(draw.choices(SYLLABLES, k=1 + int(draw.random() ** 2 * 4))) for _ in range(120)]
    (folder / "prose").mkdir()
    (folder / "lists").mkdir()
    for number in range(60):
        sentences = [
            " ".join(draw.choices(words, k=draw.randrange(3, 12))).capitalize() + "." for _ in range(draw.randrange(1, 9))
        ]
        (folder / f"prose/{number:03}.txt").write_text(" ".join(sentences) + "\n", encoding="utf-8")
    lines = [json.dumps({"text": ", ".join(sorted(draw.choices(words, k=draw.randrange(2, 30))))}) for _ in range(80)]
    (folder / "lists/all.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def losses(folder: Path) -> dict[str, object]:
    """Losses of every step and of the validation after the last, through everything that a run goes through."""
    from outgrow.cluster.local import run_local
    from outgrow.contracts import JobSpec, RunRef, StepRecord
    from outgrow.recipes.schema import Recipe
    from outgrow.recipes.schema.site import Site
    from outgrow.streaming.build import build
    from outgrow.trainers.loop import train_worker

    write_corpus(folder)
    recipe = Recipe.model_validate(RECIPE)
    site = Site.model_validate(
        {
            "storage": str(folder / "storage"),
            "cache": str(folder / "cache"),
            "sources": {name: str(folder / name) for name in ("prose", "lists")},
            "build_processes": 1,
            "monitoring": {"agent": False, "folder": str(folder / "monitoring")},
        }
    )
    run = RunRef(name="golden", folder="runs/golden", fingerprint="golden")
    (folder / "storage/runs/golden").mkdir(parents=True)
    job = JobSpec(
        recipe=recipe.to_dict(),
        site=site.to_dict(),
        card=build(recipe, site).card,
        run=run,
        workers=1,
        threads_per_worker=1,
        device="cpu",
        launched=time.time(),
    )
    records: list[StepRecord] = []
    run_local(job, train_worker, on_record=records.append)
    return {
        "losses": [record.loss for record in records if record.kind == "step"],
        "validation": {name: loss for r in records if r.kind == "validation" for name, loss in r.detail["streams"].items()},
    }


def test_losses_are_what_they_were(tmp_path: Path) -> None:
    golden, found = json.loads(GOLDEN.read_text()), losses(tmp_path)
    assert len(golden["losses"]) == STEPS
    assert found["losses"] == pytest.approx(golden["losses"], rel=0, abs=1e-4)
    assert found["validation"] == pytest.approx(golden["validation"], rel=0, abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(losses(Path(scratch)), indent=1) + "\n")
    sys.stdout.write(GOLDEN.read_text())
