"""One step of small models by an engine, on one rank and on two: loss and gradient norm must not differ.

    python -m outgrow.trainers.models.sharded_probe FOLDER RANK

is one of two ranks: it reads the configurations in FOLDER's folders, meets the other rank through a file there, and prints the
figures as JSON. Each rank's row repeats one token, so that the ranks' tokens choose different experts where there are any.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from outgrow.contracts import Batch, Layout
from outgrow.errors import TrainingError
from outgrow.processes import end_rank
from outgrow.recipes.schema import Recipe
from outgrow.trainers.engines import make_engine, unmarked
from outgrow.trainers.models.build import checked_config, folder_config, meta_model
from outgrow.trainers.models.initialise import SeededWeights

LENGTH = 16
_LIMIT_S = 300
TOKENS = (3, 7)


def measure(config: PretrainedConfig, *, world: int, rank: int) -> dict[str, float]:
    """``loss`` and ``grad_norm`` of one step on two rows, in float64; plain on one rank, FSDP2 on two."""
    layout = Layout(
        engine="plain" if world == 1 else "fsdp2",
        world=world,
        replicate=1,
        shard=world,
        global_rows=len(TOKENS),
        micro_rows=len(TOKENS) // world,
        accumulation=1,
    )
    engine = make_engine(layout, _recipe(config.model_type), meta_model(config, "fp64"), torch.device("cpu"))
    engine.load_model(SeededWeights(config, 0))
    engine.accumulate(_rows(TOKENS[rank::world]), len(TOKENS) * LENGTH, unmarked)
    sums = engine.finish()
    return {"loss": float(engine.reduce_sum(sums.loss)), "grad_norm": float(sums.grad_norm)}


def measure_on_two_ranks(configs: Mapping[str, PretrainedConfig], folder: Path) -> dict[str, dict[str, float]]:
    """``measure`` of each configuration by two processes that this starts and ends; ``folder`` is empty before.

    Raises ``TrainingError`` with the last line of what a rank said when it failed.
    """
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        ended = [(*process.communicate(timeout=_LIMIT_S), process.returncode) for process in ranks]
    except subprocess.TimeoutExpired as error:
        raise TrainingError(f"two ranks had not finished one step of each model after {_LIMIT_S} s") from error
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    for _, errors, code in ended:
        if code:
            raise TrainingError(errors.decode(errors="replace").strip().rpartition("\n")[2])
    figures: dict[str, dict[str, float]] = json.loads(ended[0][0])
    return figures


def _rows(tokens: tuple[int, ...]) -> Batch:
    token_ids = torch.tensor(tokens)[:, None].expand(-1, LENGTH).contiguous()
    return Batch(
        token_ids=token_ids,
        targets=(token_ids + torch.arange(LENGTH)) % 50,
        weights=torch.ones(token_ids.shape),
        segments=torch.zeros(token_ids.shape, dtype=torch.int32),
        positions=torch.arange(LENGTH).expand(token_ids.shape).contiguous(),
        pairs=torch.full(token_ids.shape, -1, dtype=torch.int32),
        row_ids=torch.arange(len(tokens)),
    )


def _recipe(family: str) -> Recipe:
    source = {"kind": "text", "path": "unused"}
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "probe", "seed": 0},
            "model": {"kind": "architecture", "family": family},
            "data": {
                "sequence_length": LENGTH,
                "tokenizer": {"kind": "train", "vocab_size": 260},
                "streams": [{"name": "unused", "source": source}],
            },
            "batch": {"rows": len(TOKENS)},
            "duration": {"steps": 1},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "precision": "fp64",
        }
    )


def _as_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        figures = {
            path.name: measure(checked_config(folder_config(path), str(path)), world=2, rank=rank)
            for path in sorted(folder.iterdir())
            if path.is_dir()
        }
    finally:
        dist.destroy_process_group()
    print(json.dumps(figures))
    end_rank(0)


if __name__ == "__main__":
    _as_rank(Path(sys.argv[1]), int(sys.argv[2]))
