"""What does not go together is refused, and each change that a refusal names makes the recipe one that is not."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from outgrow.errors import PlanError
from outgrow.recipes.combinations import EXPERTS, RULES, Rule, refusals, require
from outgrow.recipes.loading import load
from outgrow.recipes.schema import Recipe

TEXT = """
schema: 1
run: {name: case, seed: 1}
model: {kind: folder, path: model}
data:
  sequence_length: 2048
  tokenizer: {kind: folder, path: model}
  streams: [{name: a, source: {kind: text, path: texts}}]
batch: {rows: 64}
duration: {steps: 100}
optimizer: {learning_rate: 0.00001}
"""
ZERO = "parallel={kind: zero}"
NVME = "parallel={kind: zero, offload_optimizer: nvme, offload_parameters: nvme}"
QLORA = "adapter={kind: lora, base: nf4}"
CUSTOM = "model={kind: custom, factory: 'models.gpt:gpt'}"
FROM_NOTHING = "model={kind: architecture, family: llama}"
BROKEN: dict[str, list[tuple[str, ...]]] = {
    "precision fp64 with parallel.kind zero": [("precision=fp64", ZERO), ("precision=fp64", NVME)],
    "adapter.base nf4 with precision fp64": [(QLORA, "precision=fp64")],
    "adapter.base nf4 without weights to quantise": [(QLORA, FROM_NOTHING)],
    "optimizer muon with parallel.kind zero": [("optimizer.kind=muon", ZERO), ("optimizer.kind=muon", NVME)],
    "optimizer adamw_8bit with parallel.kind zero": [("optimizer.kind=adamw_8bit", NVME)],
    "optimizer muon or adamw_8bit with parallel.offload cpu": [
        (f"optimizer.kind={kind}", "parallel={kind: fsdp2, offload: cpu}") for kind in ("muon", "adamw_8bit")
    ],
    "cross_entropy.kind liger on a CPU": [("cross_entropy=liger",)],
    "attention varlen or flash_attention_2 on a CPU": [("attention=varlen", "precision=bf16")],
    "attention varlen, flex or flash_attention_2 in precision fp64": [("attention=flex", "precision=fp64")],
    "attention varlen or flash_attention_2 in precision fp32": [("attention=varlen", "precision=fp32")],
    "attention flex on a CPU": [("attention=flex",)],
    "activation_offload with activation_checkpointing selective": [
        ("activation_offload=true", "activation_checkpointing=selective")
    ],
    "activation_offload on a CPU": [("activation_offload=true",)],
    "an adapter on model.kind custom": [("adapter=lora", CUSTOM)],
    "attention with model.kind custom": [("attention=sdpa", CUSTOM)],
    "cross_entropy chunked or liger with model.kind custom": [("cross_entropy=chunked", CUSTOM)],
    "activation_checkpointing selective with parallel.stage 3": [("activation_checkpointing=selective", NVME)],
    "adapter.dora and activation_checkpointing with parallel.stage 3": [
        ("adapter={kind: lora, dora: true}", "activation_checkpointing=full", parallel) for parallel in (ZERO, NVME)
    ],
    "compile blocks with parallel.stage 3": [("compile=blocks", NVME)],
    EXPERTS.asked: [("parallel={kind: zero, stage: 2, offload_optimizer: cpu}",), ("parallel={kind: zero, stage: 1}",)],
}
"""Overrides that break each rule and no other, on the device that its name says."""


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(TEXT)
    return load(path, overrides)


@pytest.mark.parametrize("rule", [*RULES, EXPERTS], ids=lambda rule: rule.asked)
def test_each_change_that_is_named_is_an_override_that_works(tmp_path: Path, rule: Rule) -> None:
    device = "cpu" if rule.asked.endswith("on a CPU") else "cuda"
    for overrides in BROKEN[rule.asked]:
        broken = refusals(recipe(tmp_path, *overrides), device, shares_experts=rule is EXPERTS)
        assert [refusal.asked for refusal in broken] == [rule.asked]
        for change in rule.nearest.split(" or "):
            changed = recipe(tmp_path, *overrides, *shlex.split(change))
            assert not refusals(changed, device, shares_experts=rule is EXPERTS), change


def test_of_several_rules_a_change_for_each_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as refused:
        require(recipe(tmp_path, "precision=fp64", ZERO, "compile=blocks"), "cuda")
    assert refused.value.hint == "precision=fp32 or parallel=fsdp2; and compile=none or parallel=fsdp2"
