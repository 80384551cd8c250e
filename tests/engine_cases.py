"""Short trainings of tiny models with outgrow's engines on packed rows; run as a script it is one rank of several.

    python tests/engine_cases.py RANK FOLDER

reads ``FOLDER/cases.json`` (name -> ``Case`` as a dict), meets the other ranks through files in the folder, first all
four, then two, then one, and rank 0 writes ``FOLDER/results.json`` (name -> ``Outcome`` as a dict). One start of Python
serves all the cases.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packed import Row, batch, corpus, global_weight
from torch.distributed.tensor import DTensor

from outgrow.contracts import Layout
from outgrow.processes import end_rank
from outgrow.recipes.deepspeed import Folders, extensions_folder
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.site import Site
from outgrow.torchvision import ensure_importable

ensure_importable()

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel  # noqa: E402

from outgrow.trainers.adapters.lora import adapt  # noqa: E402
from outgrow.trainers.adapters.sources import AdaptedWeights  # noqa: E402
from outgrow.trainers.bring_up import first_weights  # noqa: E402
from outgrow.trainers.checkpoint.resume import gather_texts  # noqa: E402
from outgrow.trainers.engines import Engine, make_engine, unmarked  # noqa: E402
from outgrow.trainers.models.build import meta_model  # noqa: E402
from outgrow.trainers.models.initialise import SeededWeights  # noqa: E402
from outgrow.trainers.regions import FlatPart, Held, Region, TensorSource, local_parts  # noqa: E402
from outgrow.trainers.schedule import learning_rate  # noqa: E402

STEPS, ROWS, LENGTH, VOCAB, SEED = 20, 8, 24, 97, 7
"""Odd on purpose: 97 divides by no number of ranks."""
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=0,
    use_cache=False,
)
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}

TORCH_WARNS_ITSELF = (
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
)
"""What torch's compiler says of torch's own code."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training: ``engine`` on ``replicate`` x ``shard`` ranks, ``micro_rows`` at a time."""

    engine: str = "plain"
    replicate: int = 1
    shard: int = 1
    micro_rows: int = 8
    precision: str = "fp64"
    family: str = "llama"
    sizes: dict[str, Any] = field(default_factory=dict)
    """Keys of the family's configuration that differ."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """The recipe's adapter; none where it is empty."""
    base: str = ""
    """The folder of the first weights; they are drawn where it is empty."""
    nvme: str = ""
    """The folder that offload to disk may write below."""
    settings: dict[str, Any] = field(default_factory=dict)
    """More keys of the recipe."""

    @property
    def world(self) -> int:
        return self.replicate * self.shard

    def layout(self) -> Layout:
        rows_a_rank = -(-ROWS // self.world)
        micro_rows = min(self.micro_rows, rows_a_rank)
        return Layout(
            engine=self.engine,
            world=self.world,
            replicate=self.replicate,
            shard=self.shard,
            global_rows=ROWS,
            micro_rows=micro_rows,
            accumulation=-(-rows_a_rank // micro_rows),
        )

    def site(self) -> Site:
        """A site on which the folder ``base`` is known, and what is made of it lies beside it."""
        base = Path(self.base)
        return Site.model_validate({"sources": {"base": str(base)}, "cache": str(base.parent)} if self.base else {})

    def folders(self) -> Folders:
        """DeepSpeed's: what it compiles is kept from one test run to the next."""
        return Folders(extensions_folder(Path("~/.cache/outgrow").expanduser()), Path(self.nvme) if self.nvme else None)

    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.family, **{**_SIZES, **_FAMILY_SIZES[self.family], **self.sizes})

    def recipe(self) -> Recipe:
        return Recipe.model_validate(
            {
                "schema": 1,
                "run": {"name": "case", "seed": SEED},
                "model": {"kind": "folder", "path": "base"} if self.base else {"kind": "architecture", "family": self.family},
                "adapter": self.adapter or {"kind": "none"},
                "data": {
                    "sequence_length": LENGTH,
                    "tokenizer": {"kind": "folder", "path": "none"},
                    "streams": [{"name": "none", "source": {"kind": "text", "path": "none"}}],
                },
                "batch": {"rows": ROWS},
                "duration": {"steps": STEPS},
                "optimizer": {"kind": "adamw", "learning_rate": 3e-3, "clip_norm": 0.7},
                "schedule": {"kind": "linear", "warmup_steps": 5, "final_fraction": 0.1},
                "precision": self.precision,
                **self.settings,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses and gradient norms of every step, and digests of the parameters as born and as trained."""

    losses: list[float]
    norms: list[float]
    validation: float
    born: str
    trained: str
    readers: list[int]
    """Ranks that read some of the first weights, and did not have all from another."""


def train(case: Case, rank: int = 0) -> Outcome:
    """Run a case on this rank; every rank of its world calls it."""
    read: list[str] = []
    engine = born_engine(case, read)
    born = parameters_digest(engine)
    losses, norms = [], []
    for loss, norm in trained_steps(engine, case, rank, rows_of_steps()):
        losses.append(loss)
        norms.append(norm)
    return Outcome(
        losses=losses,
        norms=norms,
        validation=validation_loss(engine, case, rank),
        born=born,
        trained=parameters_digest(engine),
        readers=[number for number, names in enumerate(gather_texts(" ".join(read))) if names],
    )


def born_engine(case: Case, read: list[str] | None = None) -> Engine:
    """The case's engine with its first weights, as ``trainers.bring_up`` makes it; ``read`` gets the names that were read."""
    recipe, device = case.recipe(), torch.device("cpu")
    model = born_model(case)
    engine = make_engine(case.layout(), recipe, model, device, case.folders())
    weights = first_weights(recipe, case.site(), case.config(), model, device)
    engine.load_model(weights if read is None else Watched(weights, read))
    if isinstance(recipe.adapter, Lora) and recipe.adapter.base == "nf4":
        from outgrow.trainers.adapters.nf4 import attach_quant_states

        assert isinstance(weights, AdaptedWeights)
        attach_quant_states(model, weights.base, device)
    return engine


class Watched:
    """A ``TensorSource`` that writes down which names are read."""

    def __init__(self, source: TensorSource, read: list[str]) -> None:
        self._source, self._read = source, read

    def names(self) -> Collection[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str, region: Region) -> torch.Tensor:
        self._read.append(name)
        return self._source.read(name, region)


def born_model(case: Case) -> PreTrainedModel:
    """The case's model on meta, adapter and all."""
    recipe = case.recipe()
    model = meta_model(case.config(), recipe.precision)
    adapt(model, recipe)
    return model


def rows_of_steps() -> list[list[Row]]:
    return corpus(SEED, steps=STEPS, rows=ROWS, length=LENGTH, vocab=VOCAB)


def trained_steps(
    engine: Engine, case: Case, rank: int, rows_of: Sequence[Sequence[Row]], first: int = 0
) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of each step of ``rows_of``, the first of which is step ``first``."""
    recipe, layout = case.recipe(), case.layout()
    for step, rows in enumerate(rows_of, start=first):
        for ids in layout.rank_rows(tuple(range(len(rows))), rank):
            engine.accumulate(batch([rows[i] for i in ids], LENGTH), global_weight(rows), unmarked)
        sums = engine.finish()
        engine.apply(learning_rate(recipe, step, STEPS))
        yield engine.reduce_sum(sums.loss).item(), sums.grad_norm.item()


def validation_loss(engine: Engine, case: Case, rank: int) -> float:
    rows = corpus(SEED + 1, steps=1, rows=ROWS, length=LENGTH, vocab=VOCAB)[0]
    pairs = [
        torch.stack(engine.evaluate(batch([rows[i] for i in ids], LENGTH)))
        for ids in case.layout().rank_rows(tuple(range(len(rows))), rank)
    ]
    nll, weight = engine.reduce_sum(torch.stack(pairs).sum(0)).tolist()
    return float(nll / weight)


def parameters_digest(engine: Engine) -> str:
    """sha256 over all whole trained parameters in the order of their names; a collective where the engine shards."""
    digest = hashlib.sha256()
    for name, tensor in sorted(engine.tensors().items()):
        if name.startswith("model/"):
            digest.update(whole(tensor).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whole(held: Held) -> torch.Tensor:
    """The full tensor; a collective where it is cut."""
    if isinstance(held, DTensor):
        return held.full_tensor()
    if not isinstance(held, FlatPart):
        return held
    full = torch.zeros(held.shape, dtype=held.dtype)
    for part, region in local_parts(held):
        full[region.slices] = part
    dist.all_reduce(full)
    return full


def born_weights(case: Case) -> dict[str, torch.Tensor]:
    """The whole parameters that the case's engine starts from, float32, by transformers' names."""
    source = SeededWeights(case.config(), SEED)
    return {name: source.read(name, Region.whole(source.shape(name))) for name in source.names()}


def on_ranks(cases: dict[str, Case], folder: Path) -> dict[str, Outcome]:
    """The outcomes of ``cases`` on as many processes as the largest asks for; fails with the first rank that fails."""
    (folder / "cases.json").write_text(json.dumps({name: asdict(case) for name, case in cases.items()}))
    run_ranks(__file__, max(case.world for case in cases.values()), folder)
    return {name: Outcome(**outcome) for name, outcome in json.loads((folder / "results.json").read_text()).items()}


def run_ranks(script: str, world: int, folder: Path) -> None:
    """Returns once ``world`` processes of ``script RANK FOLDER`` have ended well; fails with the first that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    warnings = [argument for rule in ("error", *TORCH_WARNS_ITSELF) for argument in ("-W", rule)]
    ranks = [
        subprocess.Popen([sys.executable, *warnings, script, str(rank), str(folder)], env=environment) for rank in range(world)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            time.sleep(0.1)
        assert not any(rank.returncode for rank in ranks), "a rank failed"
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    cases = {name: Case(**case) for name, case in json.loads((folder / "cases.json").read_text()).items()}
    outcomes = {}
    for world in (4, 2, 1):
        mine = {name: case for name, case in cases.items() if case.world == world}
        if rank >= world or not mine:
            continue
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(folder / f"store-{world}"), world), rank=rank, world_size=world
        )
        for name, case in mine.items():
            print(f"rank {rank} of {world}: {name}", file=sys.stderr, flush=True)  # shown where it fails
            outcomes[name] = asdict(train(case, rank))
        dist.destroy_process_group()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(outcomes))
    end_rank(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
