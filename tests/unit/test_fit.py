"""What does not fit is refused with what there is, and with a change that does fit: the change is tried here again."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outgrow.cluster.fit import Machine, memory_refusals
from outgrow.cluster.plan import make_plan, render
from outgrow.cluster.presets_page import FOLDER, SHAPES, llama_facts
from outgrow.contracts import Gpu, Inventory, Plan
from outgrow.recipes import combinations
from outgrow.recipes.loading import load
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site

GB = 10**9
TEXT = """
schema: 1
run: {name: full, seed: 1}
model: {kind: folder, path: MODEL}
data:
  sequence_length: 2048
  tokenizer: {kind: folder, path: MODEL}
  streams: [{name: a, source: {kind: text, path: texts}}]
batch: {rows: 64}
duration: {steps: 100}
optimizer: {learning_rate: 0.00001}
"""


def recipe(folder: Path, *overrides: str, model: str = "llama-3-8b") -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(TEXT.replace("MODEL", model))
    return load(path, overrides)


def machine(gpus: int, gb: int, memory_gb: int = 2000, nodes: int = 1, disk_gb: int | None = 30_000) -> Machine:
    return Machine(
        device="cuda" if gpus else "cpu", workers=max(1, gpus) * nodes, nodes=nodes, device_bytes=gb * GB,
        memory_bytes=memory_gb * GB, disk_bytes=None if disk_gb is None else disk_gb * GB,
    )  # fmt: skip


def refusals(asked: Recipe, on: Machine) -> list[Any]:
    name = asked.model.path if asked.model.kind == "folder" else ""
    return memory_refusals(asked, llama_facts(SHAPES[name], asked), on)


@pytest.mark.parametrize(
    ("model", "on", "nearest"),
    [
        ("llama-3-8b", machine(8, 80), "add activation_checkpointing=full"),
        ("llama-3-8b", machine(8, 40), "add activation_checkpointing=full cross_entropy=chunked"),
        ("llama-3-8b", machine(8, 24), "add activation_checkpointing=full cross_entropy=chunked batch.micro_rows=1"),
    ],
)
def test_what_changes_nothing_else_is_asked_for_first(tmp_path: Path, model: str, on: Machine, nearest: str) -> None:
    (refusal,) = refusals(recipe(tmp_path, model=model), on)
    assert refusal.nearest == nearest
    assert "activations" in refusal.asked and refusal.available == f"{on.device_bytes / GB:.1f} GB on each"


@pytest.mark.parametrize(
    ("model", "on"),
    [
        ("llama-3-8b", machine(1, 96, 132)),
        ("llama-3-8b", machine(2, 24, 132)),
        ("llama-3-70b", machine(1, 96, 132)),
        ("llama-3-70b", machine(8, 80, 2000)),
        ("llama-3-70b", machine(8, 80, 2000, nodes=2)),
        ("llama-3-70b", machine(8, 40, 1500, disk_gb=2000)),
    ],
    ids=str,
)
def test_each_change_that_is_offered_fits(tmp_path: Path, model: str, on: Machine) -> None:
    (refusal,) = refusals(recipe(tmp_path, model=model), on)
    for overrides, there in offers(refusal.nearest, on):
        assert refusals(recipe(tmp_path, *overrides, model=model), there) == [], (overrides, there)
    assert "such GPUs" in refusal.nearest


def offers(nearest: str, on: Machine) -> list[tuple[list[str], Machine]]:
    """The alternatives of a refusal: what to add to the recipe, and the machine with the GPUs that it takes."""
    found = []
    for offer in nearest.split("; or "):
        added, _, cards = offer.partition("take ")
        words = shlex.split(added.removesuffix(" and ")) if added else ["add"]
        assert words[0] == "add" and (cards or words[1:]), offer
        count = int(cards.removesuffix(" such GPUs")) if cards else on.workers
        found.append(
            (words[1:], replace(on, workers=count, nodes=-(-count // max(8, on.local_workers)) if cards else on.nodes))
        )
    return found


CHUNKED = ("activation_checkpointing=full", "cross_entropy=chunked", "batch.micro_rows=1")
WORKSTATION = machine(1, 96, 132)


@pytest.mark.parametrize("parallel", ["auto", "ddp"])
def test_the_same_training_sharded_is_offered_before_another_one(tmp_path: Path, parallel: str) -> None:
    (refusal,) = refusals(recipe(tmp_path, f"parallel={parallel}", *CHUNKED, "optimizer.kind=adamw_8bit"), WORKSTATION)
    assert refusal.nearest.split("; or ")[0] == "add parallel=fsdp2"


def test_the_same_training_in_memory_is_offered_before_another_one(tmp_path: Path) -> None:
    (refusal,) = refusals(recipe(tmp_path, *CHUNKED), machine(1, 40, 512))
    assert refusal.nearest.startswith("add parallel='{kind: fsdp2, offload: cpu}'; or ")


@pytest.mark.parametrize(("model", "cards"), [("llama-3-8b", 2), ("llama-3-70b", 64)])
@pytest.mark.parametrize(
    "parallel", ["{kind: fsdp2, offload: cpu}", "{kind: zero, offload_optimizer: nvme, offload_parameters: nvme}"]
)
def test_cards_are_counted_without_the_offload_too(tmp_path: Path, parallel: str, model: str, cards: int) -> None:
    asked = recipe(tmp_path, *CHUNKED, f"parallel={parallel}", "batch.rows=1024", model=model)
    (refusal,) = refusals(asked, WORKSTATION)
    assert refusal.nearest.endswith(f"; or add parallel=fsdp2 and take {cards} such GPUs")


def test_what_needs_a_tier_is_not_offered_without_one(tmp_path: Path) -> None:
    asked, on = recipe(tmp_path, *CHUNKED, "adapter=lora", model="llama-3-70b"), WORKSTATION
    (with_one,), (without,) = refusals(asked, on), refusals(asked, replace(on, has_tier=False))
    assert "nvme" in with_one.nearest and "nvme" not in without.nearest


def test_where_a_disk_alone_is_lacking_the_room_on_it_is_asked_for(tmp_path: Path) -> None:
    asked = recipe(tmp_path, *CHUNKED, "adapter={kind: lora, base: nf4}", model="llama-3-70b")
    (refusal,) = refusals(asked, machine(1, 96, 132, disk_gb=20))
    assert refusal.nearest == "have 36 GB free on the first tier beyond its reserve, and as much capacity"
    assert refusals(asked, machine(1, 96, 132, disk_gb=36)) == []


def test_no_number_of_cards_is_offered_that_a_mixture_would_be_refused_on(tmp_path: Path) -> None:
    zero_2 = (*CHUNKED, "parallel={kind: zero, stage: 2}")
    asked = recipe(tmp_path, *zero_2)
    facts = llama_facts(SHAPES["llama-3-8b"], asked)
    (dense,), (mixture,) = (memory_refusals(asked, replace(facts, has_mixtures=has), WORKSTATION) for has in (False, True))
    assert dense.nearest.endswith("; or take 2 such GPUs")
    assert mixture.nearest.endswith("; or add parallel=fsdp2 and take 2 such GPUs")
    for overrides, there in offers(mixture.nearest, WORKSTATION):
        changed = recipe(tmp_path, *zero_2, *overrides)
        assert combinations.refusals(changed, "cuda", shares_experts=there.workers > 1) == []


@pytest.mark.parametrize(
    "overrides",
    [("model={kind: custom, factory: 'models.gpt:gpt'}",), ("precision=fp32", "attention=varlen")],
    ids=["a loss in parts is not for custom models", "a rule is broken already"],
)
def test_what_cannot_be_had_does_not_stand_in_the_way_of_what_can(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    asked, on = recipe(tmp_path, *overrides), machine(8, 80)
    facts = llama_facts(SHAPES["llama-3-8b"], asked)
    (refusal,) = memory_refusals(asked, facts, on)
    said = offers(refusal.nearest, on)[0][0]
    changed = recipe(tmp_path, *overrides, *said)
    assert memory_refusals(changed, facts, on) == []
    assert combinations.refusals(changed, "cuda") == combinations.refusals(asked, "cuda")


def test_the_number_of_cards_is_the_least_that_holds_it(tmp_path: Path) -> None:
    overrides = ("activation_checkpointing=full", "cross_entropy=chunked", "batch.micro_rows=1")
    asked = recipe(tmp_path, *overrides, model="llama-3-70b")
    (refusal,) = refusals(asked, machine(8, 80))
    assert refusal.nearest.endswith("take 24 such GPUs")
    assert refusals(asked, machine(8, 80, nodes=2)) and not refusals(asked, machine(8, 80, nodes=3))


def test_memory_and_disk_are_judged_as_devices_are() -> None:
    asked = load(FOLDER / "llama70b-full-offload.yaml")
    facts = llama_facts(SHAPES["llama-3-70b"], asked)
    assert not memory_refusals(asked, facts, machine(8, 80, 1500))
    (refusal,) = memory_refusals(asked, facts, machine(8, 80, 1000, disk_gb=1000))
    assert "1.4 TB of memory on a node (checkpoint 846.6 GB, gradients 549.8 GB, buffers 16.8 GB)" in refusal.asked
    assert "on the first tier of a node (offload 1.1 TB)" in refusal.asked
    assert refusal.available == "1.0 TB, of which 4.0 GB are left to the system; and 1.0 TB on the first tier"


def test_a_cpu_holds_all_in_memory(tmp_path: Path) -> None:
    (refusal,) = refusals(recipe(tmp_path, "precision=fp32"), machine(0, 0, 64))
    assert "of memory on a node (" in refusal.asked and "; and of each of 1 rank(s): activations" in refusal.asked
    assert "such GPUs" not in refusal.nearest


def test_without_a_tier_there_is_no_offload_to_disk_and_the_plan_shows_the_engine_below(tmp_path: Path) -> None:
    gpus = (Gpu(index=0, name="card", memory_bytes=80 * GB, compute_capability="9.0"),) * 8
    inventory = Inventory(hostname="here", cores=64, memory_bytes=2000 * GB, gpus=gpus, disks=())
    asked = load(FOLDER / "llama70b-full-offload.yaml")

    def planned(**site: Any) -> Plan:
        facts = llama_facts(SHAPES["llama-3-70b"], asked)
        return make_plan(asked, Site(**site), inventory, None, facts, free_bytes=None, environment={})

    assert [refusal.asked for refusal in planned().refusals] == ["parallel: offload to nvme"]
    made = planned(tiers=({"name": "nvme", "path": "/fast"},))
    assert not made.refusals
    assert Plan.from_dict(made.to_dict()) == made
    text = render(made)
    assert "memory  34.1 GB on the device of a rank: weights 17.6 GB" in text
    assert "a step reads 1.1 TB and writes 1.1 TB" in text
    assert 'sets    DeepSpeed {"train_batch_size": 128, "train_micro_batch_size_per_gpu": 1,' in text
    assert "/fast" in text and "sets    TORCH_EXTENSIONS_DIR=" in text
    assert "they keep 846.6 GB of parameters and states, 12.0 bytes each, over all ranks together" in text
