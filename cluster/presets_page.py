"""What each preset takes on the machines it is meant for, and on a workstation: lines of its header, and docs/presets.md.

``python -m outgrow.cluster.presets_page`` writes both anew; a test fails where they are not what the forecast says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from outgrow.cluster.fit import Machine, memory_refusals, node_bytes, terms
from outgrow.cluster.sizes import size
from outgrow.contracts import Forecast, ModelFacts
from outgrow.recipes import layout as layouts
from outgrow.recipes.loading import load
from outgrow.recipes.memory import forecast, state_bytes
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import Lora
from outgrow.recipes.schema.data import TrainTokenizer
from outgrow.recipes.schema.model import ArchitectureModel, FolderModel

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "presets"
PAGE = ROOT / "docs" / "presets.md"

BEGIN, END = "# figures, made by python -m outgrow.cluster.presets_page:", "# end of figures"
"""Lines of a preset between which the figures are written."""

_GB = 10**9
_HEAD_OF_LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES: Mapping[str, dict[str, Any]] = {
    "llama-3-8b": _HEAD_OF_LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _HEAD_OF_LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Keys of the ``config.json`` of the folders that presets name."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Machines that a preset is planned on, sizes in decimal GB; ``overrides`` as on the command line."""

    gpus: int
    gpu_gb: int
    nodes: int = 1
    memory_gb: int = 2000
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        cards = f"{self.gpus} x {self.gpu_gb} GB"
        machines = f"{self.nodes} nodes of {cards}" if self.nodes > 1 else cards
        return " ".join([machines, *self.overrides])


TARGETS: Mapping[str, tuple[Target, ...]] = {
    "llama70b-qlora": (Target(gpus=1, gpu_gb=96, memory_gb=132),),
    "llama70b-lora": (Target(gpus=2, gpu_gb=96), Target(gpus=4, gpu_gb=96)),
    "llama70b-full": (
        Target(gpus=8, gpu_gb=80, nodes=2),
        Target(gpus=8, gpu_gb=80, nodes=4, overrides=("optimizer.kind=adamw",)),
    ),
    "llama70b-full-offload": (
        Target(gpus=8, gpu_gb=80),
        Target(gpus=8, gpu_gb=80, memory_gb=3000, overrides=("parallel.offload_optimizer=cpu",)),
    ),
    "llama8b-continue": (
        Target(gpus=1, gpu_gb=96, memory_gb=132),
        Target(gpus=2, gpu_gb=96),
        Target(gpus=8, gpu_gb=80),
        Target(gpus=8, gpu_gb=80, nodes=2),
    ),
    "russian-70b-lora": (
        Target(gpus=1, gpu_gb=96, memory_gb=132),
        Target(gpus=4, gpu_gb=96, overrides=("adapter.base=full",)),
    ),
    "scratch-350m": (Target(gpus=1, gpu_gb=24, memory_gb=64), Target(gpus=8, gpu_gb=80)),
    "scratch-1b": (Target(gpus=1, gpu_gb=96, memory_gb=132), Target(gpus=8, gpu_gb=80)),
    "sft-lima": (Target(gpus=1, gpu_gb=48, memory_gb=64), Target(gpus=1, gpu_gb=96, memory_gb=132)),
}
"""The machines that each preset is meant for."""

WORKSTATION = Target(gpus=1, gpu_gb=96, memory_gb=132)
WORKSTATION_DISK_GB = 3000


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Bytes of a preset on a target: on the fullest GPU, in a node's memory, on a node's NVMe and in the run's storage."""

    foreseen: Forecast
    memory: int
    weights: int
    checkpoints: int

    @property
    def device(self) -> int:
        return sum(self.foreseen.device.values())

    @property
    def kept(self) -> int:
        """Weights to go on from, their copy in 4 bits, and what is offloaded."""
        return self.weights + sum(self.foreseen.disk.values())


def figures(recipe: Recipe, target: Target) -> Figures:
    """What ``recipe``, with the target's overrides in it, takes there."""
    facts = facts_of(recipe)
    layout = layouts.resolve(recipe, target.gpus * target.nodes, target.gpus)
    foreseen = forecast(recipe, facts, layout, target.gpus, "cuda")
    assert foreseen is not None
    saved = recipe.checkpoint.keep_newest + recipe.checkpoint.keep_best + 1
    return Figures(
        foreseen=foreseen,
        memory=node_bytes(foreseen, "cuda", target.gpus),
        weights=2 * facts.parameters if isinstance(recipe.model, FolderModel) else 0,
        checkpoints=saved * state_bytes(recipe, facts),
    )


def machine(target: Target) -> Machine:
    """The target as ``fit`` judges it; the disk of none but the workstation is known."""
    return Machine(
        device="cuda",
        workers=target.gpus * target.nodes,
        nodes=target.nodes,
        device_bytes=target.gpu_gb * _GB,
        memory_bytes=target.memory_gb * _GB,
        disk_bytes=WORKSTATION_DISK_GB * _GB if target == WORKSTATION else None,
    )


def facts_of(recipe: Recipe) -> ModelFacts:
    """The facts of a preset's Llama, by arithmetic alone: what ``trainers.models.build.facts`` finds of the same model."""
    if isinstance(recipe.model, ArchitectureModel):
        assert isinstance(recipe.data.tokenizer, TrainTokenizer)
        keys = recipe.model.config | {"vocab_size": recipe.data.tokenizer.vocab_size}
    else:
        assert isinstance(recipe.model, FolderModel)
        keys = SHAPES[recipe.model.path]
    return llama_facts(keys, recipe)


def llama_facts(keys: Mapping[str, Any], recipe: Recipe) -> ModelFacts:
    """The facts of a Llama with these keys in its ``config.json``, and what the recipe's adapter takes of it."""
    hidden, inner, heads = keys["hidden_size"], keys["intermediate_size"], keys["num_attention_heads"]
    groups = keys["num_key_value_heads"] * hidden // heads
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (groups, hidden),
        "self_attn.v_proj": (groups, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    blocks = tuple(f"model.layers.{number}" for number in range(keys["num_hidden_layers"]))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (keys["vocab_size"], hidden)}
    names = list[str]()
    for block in blocks:
        names += [f"{block}.{name}.weight" for name in linear]
        shapes |= {f"{block}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{block}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not keys.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (keys["vocab_size"], hidden)
    return ModelFacts(
        family="llama",
        parameters=sum(prod(shape) for shape in shapes.values()),
        largest_tensor=max(prod(shape) for shape in shapes.values()),
        blocks=len(blocks),
        hidden_size=hidden,
        vocab_size=keys["vocab_size"],
        max_positions=keys.get("max_position_embeddings", 8192),
        tied_embeddings=bool(keys.get("tie_word_embeddings")),
        shapes=shapes,
        block_names=blocks,
        linear=tuple(names),
        adapted=_adapted(recipe, names),
        heads=heads,
    )


def _adapted(recipe: Recipe, names: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(recipe.adapter, Lora):
        return ()
    patterns = ("*",) if recipe.adapter.targets == "all-linear" else recipe.adapter.targets
    return tuple(name for name in names if any(fnmatchcase(name, f"*{pattern}.weight") for pattern in patterns))


# --- what is written --------------------------------------------------------------------------------------------------


def header(name: str) -> list[str]:
    """The lines between ``BEGIN`` and ``END`` of a preset: what it takes where, and what the workstation can do with it."""
    path = FOLDER / f"{name}.yaml"
    lines = ["# What it takes of each GPU and node, as `outgrow plan` works it out; NVMe traffic is that of a step."]
    for target in TARGETS[name]:
        found = figures(load(path, target.overrides), target)
        lines += [
            f"#   {target}",
            f"#     {size(found.device)} of GPU memory, {size(found.memory)} of memory, {size(found.kept)} of NVMe beside "
            f"{size(found.checkpoints)} of checkpoints, {_traffic(found.foreseen)}",
        ]
    return [*lines, f"# A workstation of 1 x 96 GB, 132 GB of memory and 3 TB of NVMe {_on_workstation(load(path))}"]


def _on_workstation(recipe: Recipe) -> str:
    refusals = memory_refusals(recipe, facts_of(recipe), machine(WORKSTATION))
    found = figures(recipe, WORKSTATION)
    if not refusals and found.kept + found.checkpoints <= WORKSTATION_DISK_GB * _GB:
        return f"runs it as it is: {size(found.device)} on the GPU, {size(found.memory)} of memory."
    needs = f"cannot: {size(found.device)} on the GPU, {size(found.memory)} of memory."
    return f"{needs}\n#   It could so: {refusals[0].nearest}." if refusals else needs


def _traffic(foreseen: Forecast) -> str:
    if not foreseen.step_read_bytes:
        return "no NVMe traffic"
    return f"{size(foreseen.step_read_bytes)} read and {size(foreseen.step_written_bytes)} written"


def with_header(text: str, lines: Sequence[str]) -> str:
    """The text of a preset with the lines between its marks replaced."""
    before, _, rest = text.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"{END}\n")
    return f"{before}{BEGIN}\n" + "".join(f"{line}\n" for line in lines) + f"{END}\n{after}"


def page() -> str:
    """docs/presets.md."""
    return "\n".join(["<!-- made by python -m outgrow.cluster.presets_page -->", "", "# Presets", "", *_page(), ""])


def _page() -> Iterator[str]:
    yield (
        "Recipes to begin with, in `recipes/presets/`. `outgrow plan` works out the figures for any machine, there or not: "
        "`outgrow plan RECIPE --gpus 8 --gpu-memory '80 GB' --ram '2 TB'`. Sizes are decimal; GPU memory is that of the "
        "fullest rank with the longest rows, its allocator and CUDA included; NVMe holds the weights to go on from (16 bits a "
        "parameter), their copy in 4 bits, and what is offloaded; checkpoints are all that are kept, and the one being written."
    )
    yield ""
    yield "| preset | on | GPU | node's memory | NVMe | NVMe traffic a step | checkpoints |"
    yield "|---|---|---|---|---|---|---|"
    for name, targets in TARGETS.items():
        for target in targets:
            found = figures(load(FOLDER / f"{name}.yaml", target.overrides), target)
            cells = [f"[{name}](../recipes/presets/{name}.yaml)", f"`{target}`", size(found.device), size(found.memory)]
            cells += [size(found.kept), _traffic(found.foreseen), size(found.checkpoints)]
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield "## What the fullest GPU holds"
    yield ""
    for name, targets in TARGETS.items():
        found = figures(load(FOLDER / f"{name}.yaml", targets[0].overrides), targets[0])
        yield f"- {name}, {targets[0]}: {terms(found.foreseen.device)}"
    yield ""
    yield "## On a workstation of 1 x 96 GB, 132 GB of memory and 3 TB of NVMe"
    yield ""
    for name in TARGETS:
        yield f"- {name}: {_on_workstation(load(FOLDER / f'{name}.yaml'))}".replace("\n#  ", "")


def main() -> None:
    for name in TARGETS:
        path = FOLDER / f"{name}.yaml"
        path.write_text(with_header(path.read_text(), header(name)))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
