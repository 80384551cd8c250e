"""Speed and memory of each switch of a recipe against none of them, on a CPU: what runs on GPUs alone is in benchmarks/gpu.py.

    python benchmarks/switches.py [--pairs 8] [--threads 2] [--only NAME]        prints a table in Markdown

Speed: steps with and without the switch in turns within one process, so that a noisy machine slows both; the ratio is the
median of pairs. Memory: a process with the switch and one without, three steps each, every allocation returned to the system at
once (MALLOC_MMAP_THRESHOLD_); the peak is the most anonymous memory, weights and optimizer included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cross_entropy import MB, Peak

from outgrow.contracts import IGNORE_INDEX, Batch
from outgrow.recipes.layout import resolve
from outgrow.recipes.schema import Recipe
from outgrow.trainers.engines import make_engine, unmarked
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.initialise import SeededWeights

from transformers import LlamaConfig  # isort: skip  (after outgrow has made torchvision importable)

ROWS, LENGTH, VOCABULARY = 4, 512, 16384
SWITCHES: Mapping[str, dict[str, Any]] = {
    "rows of one document (no mask)": {},
    "attention: eager": {"attention": "eager"},
    "cross_entropy: chunked, 256 tokens": {"cross_entropy": {"kind": "chunked", "tokens": 256}},
    "cross_entropy: chunked, 1024 tokens": {"cross_entropy": {"kind": "chunked", "tokens": 1024}},
    "activation_checkpointing: full": {"activation_checkpointing": {"kind": "full"}},
    "activation_checkpointing: full, every 2": {"activation_checkpointing": {"kind": "full", "every": 2}},
    "activation_checkpointing: selective": {"activation_checkpointing": {"kind": "selective"}},
    "selective, every_second_matmul": {
        "activation_checkpointing": {"kind": "selective", "keep": ["every_second_matmul", "attention"]}
    },
    "compile: blocks": {"compile": "blocks"},
    "optimizer: adamw_8bit": {"optimizer": {"kind": "adamw_8bit", "learning_rate": 1e-3}},
    "optimizer: muon": {"optimizer": {"kind": "muon", "learning_rate": 1e-3}},
    "chunked, full, adamw_8bit together": {
        "cross_entropy": {"kind": "chunked", "tokens": 256},
        "activation_checkpointing": {"kind": "full"},
        "optimizer": {"kind": "adamw_8bit", "learning_rate": 1e-3},
    },
}
"""Sections of a recipe by the name of their row."""
UNPACKED = "rows of one document (no mask)"


def recipe_of(sections: Mapping[str, Any]) -> Recipe:
    stream = {"name": "none", "source": {"kind": "text", "path": "none"}}
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "switches", "seed": 1},
            "model": {"kind": "architecture", "family": "llama"},
            "data": {"sequence_length": LENGTH, "tokenizer": {"kind": "folder", "path": "none"}, "streams": [stream]},
            "batch": {"rows": ROWS},
            "duration": {"steps": 100},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "precision": "fp32",
            **sections,
        }
    )


def batch_of(document: int) -> Batch:
    """Rows of documents of ``document`` tokens."""
    token_ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    places = torch.arange(LENGTH).expand(ROWS, LENGTH)
    targets = token_ids[:, 1:].clone()
    targets[:, document - 1 :: document] = IGNORE_INDEX
    return Batch(
        token_ids=token_ids[:, :-1].contiguous(),
        targets=targets,
        weights=(targets != IGNORE_INDEX).float(),
        segments=(places // document).int(),
        positions=places % document,
        pairs=torch.full((ROWS, LENGTH), -1, dtype=torch.int32),
        row_ids=torch.arange(ROWS),
    )


def stepper(name: str) -> Callable[[], None]:
    """A step of an engine with the switch of this name; of one with none where the name is empty."""
    recipe = recipe_of(SWITCHES.get(name, {}))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=None, use_cache=False,
    )  # fmt: skip
    engine = make_engine(resolve(recipe, 1, 1), recipe, meta_model(config, recipe.precision), torch.device("cpu"))
    engine.load_model(SeededWeights(config, recipe.run.seed))
    batch = batch_of(LENGTH if name == UNPACKED else 200)
    weight = float(batch.weights.sum())

    def step() -> None:
        engine.accumulate(batch, weight, unmarked)
        engine.finish()
        engine.apply(1e-4)

    return step


def timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def pairs_of(name: str, pairs: int) -> list[tuple[float, float]]:
    """Seconds of a step (without, with), who goes first changing from pair to pair."""
    without, switched = stepper(""), stepper(name)
    for step in (without, switched, without, switched):
        step()
    found = []
    for number in range(pairs):
        if number % 2:
            first = timed(without)
            found.append((first, timed(switched)))
        else:
            first = timed(switched)
            found.append((timed(without), first))
    return found


def peak_of(name: str) -> int:
    """Bytes."""
    with Peak() as peak:
        step = stepper(name)
        for _ in range(3):
            step()
    return peak.bytes


def asked(what: str, name: str, given: argparse.Namespace) -> Any:
    command = [sys.executable, __file__, "--threads", str(given.threads), "--pairs", str(given.pairs), "--what", what]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "memory" else {})
    done = subprocess.run([*command, "--name", name], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main(given: argparse.Namespace) -> None:
    sizes = f"{ROWS} rows of {LENGTH} tokens packed from documents of 200, vocabulary {VOCABULARY}"
    print(f"torch {torch.__version__}, {given.threads} threads, float32, {sizes}; load {os.getloadavg()[0]:.1f}\n")
    print("| switch | tokens/s without | tokens/s | speed, ratio: median (middle half) | peak memory, MB | memory, ratio |")
    print("|---|---|---|---|---|---|")
    plain = asked("memory", "", given)
    print(f"| none | | | | {plain / MB:,.0f} | |", flush=True)
    for name in [given.only] if given.only else SWITCHES:
        pairs = asked("time", name, given)
        memory = asked("memory", name, given)
        low, middle, high = statistics.quantiles([without / switched for without, switched in pairs], n=4)
        rates = [ROWS * LENGTH / statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
        speed = f"{middle:.3f} ({low:.3f} - {high:.3f})"
        print(
            f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {speed} | {memory / MB:,.0f} | {memory / plain:.2f} |", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of steps for each switch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=SWITCHES, help="this switch alone")
    parser.add_argument("--what", choices=["time", "memory"], help="measure one (used by the script itself)")
    parser.add_argument("--name", help="of the switch (used by the script itself)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if arguments.what == "time":
        print(json.dumps(pairs_of(arguments.name, arguments.pairs)))
    elif arguments.what == "memory":
        print(peak_of(arguments.name))
    else:
        main(arguments)
