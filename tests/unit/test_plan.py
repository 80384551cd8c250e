"""The plan adds up, and says no to all that could not start, with the nearest thing that could."""

from __future__ import annotations

from typing import Any

import pytest

from outgrow.cluster.plan import Ranks, make_plan, refuse, render, resolve_ranks, size
from outgrow.contracts import DatasetCard, Gpu, Inventory, ModelFacts, Plan
from outgrow.errors import PlanError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site

GB = 10**9
FACTS = ModelFacts(
    family="llama", parameters=5_000_000, largest_tensor=1_000_000, blocks=6, hidden_size=256, vocab_size=4096,
    max_positions=512, tied_embeddings=True,
)  # fmt: skip
CARD = DatasetCard(
    store="datasets/x", index="datasets/x/rows", store_fingerprint="s", index_fingerprint="i", tokenizer_fingerprint="t",
    vocab_size=4096, eos_token_id=0, sequence_length=128, tokens=120_000, rows=1001, fill=0.94, validation_rows=10, bytes=1,
    streams=(),
)  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "schema": 1,
        "run": {"name": "small", "seed": 1},
        "model": {"kind": "architecture", "family": "llama"},
        "data": {
            "sequence_length": 128,
            "tokenizer": {"kind": "train", "vocab_size": 4096},
            "streams": [{"name": "a", "source": {"kind": "text", "path": "texts"}}],
        },
        "batch": {"rows": 32},
        "duration": {"steps": 100},
        "optimizer": {"learning_rate": 1e-3},
        "precision": "fp32",
    }
    return Recipe.model_validate(data | changes)


def machine(cores: int = 8, gpus: int = 0) -> Inventory:
    cards = tuple(Gpu(index=i, name="card", memory_bytes=96 * GB, compute_capability="12.0") for i in range(gpus))
    return Inventory(hostname="here", cores=cores, memory_bytes=64 * GB, gpus=cards, disks=())


def plan(
    asked: Recipe | None = None,
    site: Site | None = None,
    inventory: Inventory | None = None,
    card: DatasetCard | None = CARD,
    free_bytes: int | None = 100 * GB,
    cluster: str | None = None,
) -> Plan:
    return make_plan(
        asked or recipe(), site or Site(), inventory or machine(), card, FACTS,
        free_bytes=free_bytes, environment={"RAY_AUTH_MODE": "token"}, cluster=cluster,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("site", "inventory", "ranks"),
    [
        (Site(), machine(8), Ranks(device="cpu", workers=1, threads=8)),
        (Site(workers=3), machine(8), Ranks(device="cpu", workers=3, threads=2)),
        (Site(workers=3, threads_per_worker=1), machine(8), Ranks(device="cpu", workers=3, threads=1)),
        (Site(workers=9), machine(8), Ranks(device="cpu", workers=9, threads=1)),
        (Site(), machine(8, gpus=4), Ranks(device="cuda", workers=4, threads=2)),
        (Site(device="cpu"), machine(8, gpus=4), Ranks(device="cpu", workers=1, threads=8)),
        (Site(device="cuda"), machine(8), Ranks(device="cuda", workers=1, threads=8)),
    ],
)
def test_auto_is_one_rank_a_gpu_and_the_cores_shared(site: Site, inventory: Inventory, ranks: Ranks) -> None:
    assert resolve_ranks(site, inventory) == ranks


def test_a_plan_adds_up() -> None:
    made = plan(site=Site(workers=2), inventory=machine(8))
    assert not made.refusals
    assert made.layout is not None
    assert (made.layout.engine, made.layout.world, made.layout.micro_rows) == ("fsdp2", 2, 16)
    assert (made.steps, made.steps_per_epoch) == (100, 32)  # 1001 rows by 32: 31 whole steps and a short one
    assert made.tokens == round(120_000 * (3 + 4 * 32 / 1001))
    assert made.checkpoint_bytes == 5_000_000 * 12 + 2**20
    assert made.run_bytes == (2 + 1 + 1) * made.checkpoint_bytes
    assert made.environment == {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "4"}
    assert Plan.from_dict(made.to_dict()) == made
    refuse(made)


def test_float64_takes_twice_the_disk() -> None:
    assert plan(recipe(precision="fp64")).checkpoint_bytes == 5_000_000 * 24 + 2**20


def test_before_the_data_are_built_steps_are_known_unless_they_are_epochs() -> None:
    unbuilt = plan(card=None)
    assert (unbuilt.steps, unbuilt.tokens, unbuilt.steps_per_epoch) == (100, 100 * 32 * 128, 0)
    epochs = plan(recipe(duration={"epochs": 2}), card=None)
    assert (epochs.steps, epochs.refusals) == (0, ())
    assert "known when the dataset is built" in render(epochs)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"site": Site(workers=9)}, "9 rank(s) of 1 CPU(s); available: 8 CPUs\n    workers: 8 in site.yaml"),
        (
            {"site": Site(workers=2, threads_per_worker=5)},
            "2 rank(s) of 5 CPU(s); available: 8 CPUs\n    threads_per_worker: 4 in site.yaml",
        ),
        (
            {"site": Site(workers=3), "inventory": machine(8, gpus=2)},
            "3 rank(s) on cuda; available: 2 GPUs\n    workers: 2 in site.yaml",
        ),
        ({"site": Site(device="cuda")}, "1 rank(s) on cuda; available: 0 GPUs\n    device: cpu in site.yaml"),
        (
            {"asked": recipe(batch={"rows": 2}), "site": Site(workers=4)},
            "batch.rows is 2, too few for 4 ranks; allowed: at most one rank a row\n"
            "    run with at most 2 workers, or raise batch.rows to 4",
        ),
        (
            {"free_bytes": 200_000_000, "site": Site(storage="/small")},
            "244.2 MB for 3 checkpoints and one being written, 61.0 MB each; available: 200.0 MB at /small\n"
            "    free 44.2 MB, or name another storage in site.yaml; or keep 2 of them (checkpoint.keep_newest, keep_best)",
        ),
        (
            {"free_bytes": 1_000_000, "site": Site(storage="/small")},
            "244.2 MB for 3 checkpoints and one being written, 61.0 MB each; available: 1.0 MB at /small\n"
            "    free 243.2 MB, or name another storage in site.yaml",
        ),
    ],
)
def test_refused_with_what_there_is_and_the_nearest(given: dict[str, Any], sentence: str) -> None:
    refused = plan(**given)
    with pytest.raises(PlanError) as caught:
        refuse(refused)
    assert str(caught.value) == f"this run cannot start\n  - {sentence}"
    assert render(refused).endswith(f"  - {sentence}")


def test_all_refusals_come_at_once() -> None:
    refused = plan(recipe(batch={"rows": 2}), Site(workers=9, device="cuda"), machine(8, gpus=1), free_bytes=0, card=CARD)
    assert len(refused.refusals) == 4
    assert refused.layout is None


def test_another_machines_cluster_is_not_judged_by_this_one() -> None:
    made = plan(site=Site(workers=16), inventory=machine(2), cluster="10.0.0.1:6379")
    assert not made.refusals
    assert "10.0.0.1:6379" in render(made)


def test_a_bucket_has_no_limit() -> None:
    assert not plan(free_bytes=None).refusals


def test_rendered_for_people() -> None:
    assert render(plan(site=Site(workers=2, storage="/data"))) == (
        "run     small\n"
        "ranks   2 on cpu, 4 thread(s) each\n"
        "layout  engine fsdp2, 1 replica(s) of 2 shard(s); 32 rows a step, 1 x 16 of them a rank at most\n"
        "length  100 steps, 375,345 tokens, 3.12 epochs\n"
        "disk    61.0 MB a checkpoint, 244.2 MB the run, at /data (100.0 GB free)\n"
        "sets    OMP_NUM_THREADS=4\n"
        "sets    RAY_AUTH_MODE=token\n"
        "note    llama: 5,000,000 parameters in 6 blocks\n"
        "\n"
        "this run can start"
    )


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (96 * GB, "96.0 GB")])
def test_sizes_read_as_disks_are_sold(count: int, text: str) -> None:
    assert size(count) == text
