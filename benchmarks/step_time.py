"""Step time of the engines against a bare hand-written loop: the same model, rows, loss and optimizer, fp32.

    python benchmarks/step_time.py [--pairs 40] [--threads 2] [--rows 8]        prints a table in Markdown

Pairs of steps, one of each, in turns within one process, so that a noisy machine slows both; the ratio is the median of pairs.
What outgrow's loop does in every step besides (seed, schedule, watch over the gradient) is counted on its side. FSDP2 on two
ranks has half the threads each. Fewer rows make the fixed cost of a step weigh more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from outgrow.contracts import IGNORE_INDEX, Batch, Layout
from outgrow.processes import end_rank
from outgrow.recipes.layout import resolve
from outgrow.recipes.loading import load
from outgrow.recipes.schema import Recipe
from outgrow.trainers.bring_up import step_seed
from outgrow.trainers.engines import make_engine, unmarked
from outgrow.trainers.finite import FiniteWatch
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.schedule import learning_rate

from transformers import AutoModelForCausalLM, LlamaConfig  # isort: skip  (after outgrow has made torchvision importable)

PRESET = Path(__file__).parent.parent / "recipes/presets/quickstart.yaml"
STEPS = 120
DOCUMENT = 200
"""Tokens a document: two and a half a row."""


def config_of(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(**recipe.model.config, vocab_size=4096, use_cache=False, pad_token_id=None, bos_token_id=None)


def rows_of(step: int, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    token_ids = torch.randint(4096, (rows, length + 1), generator=generator)
    positions = torch.arange(length).expand(rows, length)
    targets = token_ids[:, 1:].clone()
    targets[:, DOCUMENT - 1 :: DOCUMENT] = IGNORE_INDEX
    return Batch(
        token_ids=token_ids[:, :-1].contiguous(),
        targets=targets,
        weights=(targets != IGNORE_INDEX).float(),
        segments=(positions // DOCUMENT).int(),
        positions=positions % DOCUMENT,
        pairs=torch.full((rows, length), -1, dtype=torch.int32),
        row_ids=torch.arange(rows),
    )


def bare_step(recipe: Recipe) -> Callable[[int], None]:
    """A training step as one writes it by hand."""
    model = AutoModelForCausalLM.from_config(config_of(recipe), attn_implementation="sdpa").train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.optimizer.learning_rate, betas=recipe.optimizer.betas, fused=True)
    length = recipe.data.sequence_length
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def step(number: int) -> None:
        rows = rows_of(number, recipe.batch.rows, length)
        mask = causal & (rows.segments[:, :, None] == rows.segments[:, None, :])
        logits = model(
            input_ids=rows.token_ids, attention_mask=mask[:, None], position_ids=rows.positions, use_cache=False
        ).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(recipe: Recipe, layout: Layout, rank: int = 0) -> Callable[[int], None]:
    """A step of outgrow's loop, without logging."""
    config, device = config_of(recipe), torch.device("cpu")
    engine = make_engine(layout, recipe, meta_model(config, recipe.precision), device)
    engine.load_model(SeededWeights(config, recipe.run.seed))
    watch = FiniteWatch(device)

    def step(number: int) -> None:
        whole = rows_of(number, recipe.batch.rows, recipe.data.sequence_length)
        mine = Batch(**{name: getattr(whole, name)[rank :: layout.world] for name in Batch.__dataclass_fields__})
        torch.manual_seed(step_seed(recipe.run.seed, number, rank))
        engine.accumulate(mine, float(whole.weights.sum()), unmarked)
        sums = engine.finish()
        engine.apply(learning_rate(recipe, number, STEPS))
        watch.see(number, sums.grad_norm)

    return step


class Timed(NamedTuple):
    """Seconds of one step: on the wall, and of processor time over all threads, which a busy machine disturbs less."""

    wall: float
    processor: float


def timed(step: Callable[[int], None], number: int) -> Timed:
    wall, processor = time.perf_counter(), time.process_time()
    step(number)
    return Timed(time.perf_counter() - wall, time.process_time() - processor)


def paired(bare: Callable[[int], None], other: Callable[[int], None], pairs: int) -> list[tuple[Timed, Timed]]:
    """(bare, other) steps; who goes first changes from pair to pair."""
    for number in range(3):
        bare(number)
        other(number)
    found = []
    for number in range(pairs):
        if number % 2:
            b, o = timed(bare, number), timed(other, number)
        else:
            o, b = timed(other, number), timed(bare, number)
        found.append((b, o))
    return found


def line(name: str, pairs: list[tuple[Timed, Timed]]) -> str:
    bare = statistics.median(b.wall for b, _ in pairs)
    other = statistics.median(o.wall for _, o in pairs)
    wall = spread([o.wall / b.wall for b, o in pairs])
    processor = spread([o.processor / b.processor for b, o in pairs])
    return f"| {name} | {bare:.3f} | {other:.3f} | {wall} | {processor} | {len(pairs)} |"


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} - {high:.3f})"


def on_two_ranks(pairs: int, threads: int, rows: int) -> list[Timed]:
    """Steps of FSDP2 on two ranks with half the threads each, for the same global batch; rank 0's processor time, doubled."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"--pairs": pairs, "--threads": max(1, threads // 2), "--rows": rows, "--folder": folder}
        command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option), "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed")
        return [Timed(wall, 2 * processor) for wall, processor in json.loads(Path(folder, "times.json").read_text())]


def rank_of_two(rank: int, folder: Path, pairs: int, rows: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    recipe = load(PRESET, [f"batch.rows={rows}"])
    step = engine_step(recipe, resolve(recipe, 2, 2), rank)
    for number in range(3):
        step(number)
    times = [timed(step, number) for number in range(pairs)]
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    end_rank(0)


def main(pairs: int, threads: int, rows: int) -> None:
    recipe = load(PRESET, [f"batch.rows={rows}"])
    alone = load(PRESET, [f"batch.rows={rows}", "parallel.kind=fsdp2"])
    bare = bare_step(recipe)
    batch = f"{rows} rows of {recipe.data.sequence_length} tokens"
    print(f"torch {torch.__version__}, the quickstart's model, {batch}, {threads} thread(s), load {os.getloadavg()[0]:.1f}\n")
    print("| engine | bare loop, s | engine, s | ratio of wall time: median (middle half) | of processor time | pairs |")
    print("|---|---|---|---|---|---|")
    print(line("plain", paired(bare, engine_step(recipe, resolve(recipe, 1, 1)), pairs)), flush=True)
    print(line("fsdp2, 1 rank", paired(bare, engine_step(alone, resolve(alone, 1, 1)), pairs)), flush=True)
    before = [timed(bare, number) for number in range(pairs // 2)]
    ranks = on_two_ranks(pairs, threads, rows)
    after = [timed(bare, number) for number in range(pairs - pairs // 2)]
    print(line("fsdp2, 2 ranks (not paired)", list(zip(before + after, ranks, strict=True))), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of steps for each engine")
    parser.add_argument("--threads", type=int, default=2, help="threads of the process, halved for each of two ranks")
    parser.add_argument("--rows", type=int, default=8, help="rows an optimizer step")
    parser.add_argument("--rank", type=int, help="run as one of two ranks (used by the script itself)")
    parser.add_argument("--folder", type=Path, help="where ranks meet (used by the script itself)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if given.rank is None:
        main(given.pairs, given.threads, given.rows)
    else:
        rank_of_two(given.rank, given.folder, given.pairs, given.rows)
