"""docs/engines.md: which method trains with which engine, every rule of what does not go together, and how far engines agree.

``python -m outgrow.recipes.matrix_page`` writes it from ``combinations``; a test fails where it is stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outgrow.recipes.combinations import ENGINES, EXPERTS, METHODS, RULES, refusals
from outgrow.recipes.schema import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "engines.md"

_INTRODUCTION = """\
An engine is how ranks share a model: memory, messages, the order of sums. What is learned stays the recipe's: the same rows in
the same order, the same loss. `parallel` in the recipe chooses one; `auto` is `plain` on one rank and FSDP2 beyond. A
checkpoint holds whole tensors by their names, so a run that began with one engine goes on with another, on other ranks too."""

_ENGINES = {
    "plain": "One rank, the whole model on its device. In bf16: float32 masters, and a bfloat16 copy that computes.",
    "DDP": "The whole model on every rank; gradients are summed in float32 while the backward pass still runs.",
    "FSDP2": "PyTorch's `fully_shard` on blocks, embedding, head and root: parameters, gradients and states are sharded.",
    "HSDP": "FSDP2 within groups (`shard: node` or a number of ranks), copies of the model across them.",
    "FSDP2, CPU offload": "The shards lie in the node's memory, and the optimizer steps there.",
    "ZeRO-1": "DeepSpeed: states sharded; parameters and gradients whole on every rank.",
    "ZeRO-2": "DeepSpeed: states and gradients sharded; parameters whole on every rank.",
    "ZeRO-3": "DeepSpeed: states, gradients and parameters sharded.",
    "ZeRO-3, CPU offload": "The same, in the node's memory between uses; the optimizer steps there.",
    "ZeRO-3, NVMe offload": "The same, on the first tier of the site between uses; needs libaio (`make system-deps`).",
}

_TOLERANCES = """\
Twenty steps of a small Llama on packed rows, loss and gradient norm of every step against `plain` and a loop of sixty lines
that imports torch and transformers alone (`tests/integration/test_parity.py`; every cell of the table by `make test-parity`):

| what | precision | within | seen |
|---|---|---|---|
| plain, DDP, FSDP2 on 1, 2 and 4 ranks, HSDP 2 x 2; LoRA, rsLoRA and DoRA with each of them | fp64 | 1e-9 | 3e-15 |
| the same in the precision that most machines train in | fp32 | 1e-5 | 8e-7 |
| ZeRO-1, 2 and 3, with offload to memory and to disk; LoRA with them: DeepSpeed sums in float32 | fp32 | 1e-5 | 2e-6 |
| QLoRA: what 4 bits are unpacked to is float32 at most | fp32 | 1e-4 | 1e-6 |
| FSDP2, DDP and ZeRO-3 against plain; losses, and norms as a share | bf16 | 1e-3, 3e-3 | 5e-4, 1e-3 over four seeds |
| LoRA with them, norms as a share | bf16 | 1e-2 | 9e-3 over four seeds |
| another engine or number of ranks goes on from a checkpoint | fp32 | 1e-5 over the steps that are left | |

Losses are 4.1 to 4.6, norms about 1; seen on 2026-11-22, the worst of all steps and cases.

On the same machine, layout and seed a run is bit-identical, through kill and resume too. A figure without a horizon says
little: correct code at 8 x 1 rows against 1 x 8 differs by 4e-7 in the first step, by 1e-6 in the tenth and by 3e-4 in the
sixtieth."""


def page() -> str:
    """The whole page."""
    made = "<!-- made by python -m outgrow.recipes.matrix_page; change recipes/combinations.py or that file instead -->"
    return "\n".join([made, "", *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    yield from ("# Engines", "", _INTRODUCTION, "", "| engine | `parallel` | what it does |", "|---|---|---|")
    for name, parallel in ENGINES.items():
        yield f"| {name} | `{_short(parallel)}` | {_ENGINES[name]} |"
    yield from ("", "## Methods and engines", "", "Each method with a folder's weights in bf16 on a GPU.", "")
    yield f"| method | `adapter` | {' | '.join(ENGINES)} |"
    yield "|---" * (2 + len(ENGINES)) + "|"
    for method, adapter in METHODS.items():
        cells = [_cell(adapter, parallel) for parallel in ENGINES.values()]
        yield f"| {method} | `{_short(adapter)}` | {' | '.join(cells)} |"
    yield from ("", "## What does not go together", "")
    yield "`outgrow plan` refuses each of these by name, and so does the worker, before it reads a weight."
    yield from ("", "| asked | why not | what works |", "|---|---|---|")
    for rule in (*RULES, EXPERTS):
        yield f"| {rule.asked} | {rule.why} | {_escaped(rule.nearest)} |"
    yield from ("", "## How far they agree", "", _TOLERANCES)


def _cell(adapter: dict[str, Any], parallel: dict[str, Any]) -> str:
    """``yes``, or ``no`` with the names of the rules that refuse it."""
    names = [refusal.asked for refusal in refusals(_recipe(adapter, parallel), "cuda")]
    return f"no: {', '.join(names)}" if names else "yes"


def _recipe(adapter: dict[str, Any], parallel: dict[str, Any]) -> Recipe:
    source = {"kind": "text", "path": "texts"}
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "cell", "seed": 0},
            "model": {"kind": "folder", "path": "model"},
            "adapter": adapter,
            "data": {
                "sequence_length": 1024,
                "tokenizer": {"kind": "folder", "path": "model"},
                "streams": [{"name": "texts", "source": source}],
            },
            "batch": {"rows": 8},
            "duration": {"steps": 1},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-4},
            "parallel": parallel,
        }
    )


def _short(section: dict[str, Any]) -> str:
    values = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in section.items()]
    return section["kind"] if len(section) == 1 else "{" + ", ".join(values) + "}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
