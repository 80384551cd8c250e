"""The plan adds up, and says no to all that could not start, with the nearest thing that could."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from datasets_of_cards import card, index_card

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
CARD = card(index_card(128, {"a": (1001, 120_000)}))


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
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
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
    dataset: DatasetCard | None = CARD,
    free_bytes: int | None = 100 * GB,
    cluster: str | None = None,
) -> Plan:
    return make_plan(
        asked or recipe(), site or Site(), inventory or machine(), dataset, FACTS,
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
    assert plan(inventory=machine(8, gpus=1)).environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert Plan.from_dict(made.to_dict()) == made
    refuse(made)


def mixed(**data: Any) -> Recipe:
    """Three streams, with these keys of the section of data."""
    streams = [{"name": name, "source": {"kind": "text", "path": name}} for name in ("books", "general", "web")]
    tokenizer = {"kind": "train", "vocab_size": 4096}
    return recipe(data={"sequence_length": 128, "tokenizer": tokenizer, "streams": streams} | data)


MIXED_CARD = card(
    index_card(128, {"books": (1000, 128_000), "general": (300, 30_000), "web": (50, 6_400)}),
    index_card(256, {"books": (500, 128_000), "general": (150, 30_000), "web": (25, 6_400)}),
)


def test_streams_that_are_read_too_often_are_named() -> None:
    streams = [
        {"name": "books", "source": {"kind": "text", "path": "b"}},
        {"name": "general", "source": {"kind": "text", "path": "g"}, "share": 0.25},
        {"name": "web", "source": {"kind": "text", "path": "w"}, "epochs": 5},
    ]
    made = plan(mixed(streams=streams), dataset=MIXED_CARD)
    web, fixed = 5 * 6_400, 128_000 + 5 * 6_400
    general = round(fixed / 3 / 100)  # rows of 100 tokens
    assert made.steps_per_epoch == -(-(1000 + 250 + general) // 32)
    epochs = 100 / made.steps_per_epoch
    assert made.tokens == pytest.approx(epochs * (fixed * 4 / 3), rel=0.01)
    assert web == 32_000
    assert made.notes[1:] == (
        f"passes over each stream: books {epochs:.1f}, general {epochs * general / 300:.1f}, web {5 * epochs:.1f}",
        "web: read more than 4 times; beyond that repeated text tends to teach little (Muennighoff et al. 2023)",
    )


STAGES = [
    {"tokens": 40 * 32 * 128, "shares": {"books": 0.5, "general": 0.5}},
    {"tokens": 20 * 32 * 256, "shares": {"books": 0.75, "web": 0.25}, "sequence_length": 256},
    {"shares": {"books": 1.0, "web": 0}},
]


def test_stages_are_listed_and_add_up() -> None:
    made = plan(mixed(stages=STAGES), dataset=MIXED_CARD)
    assert (made.steps, made.steps_per_epoch, made.refusals) == (100, 0, ())
    # Rows are full but for those of general, of which there are more for the same share.
    rows = 40 * 32
    general = rows * 1.28 / 2.28
    first = (rows - general) * 128 + general * 100
    second = 20 * 32 * 256
    assert made.tokens == pytest.approx(first + second + 40 * 32 * 128, rel=1e-3)
    books = (rows - general) / 1000 + 0.75 * 640 / 500 + 1.28
    assert made.notes[1:] == (
        "stage 1 from step 1, 40 steps, rows of 128: books 50.0%, general 50.0%",
        "stage 2 from step 41, 20 steps, rows of 256: books 75.0%, web 25.0%",
        "stage 3 from step 61, to the end, rows of 128: books 100.0%",
        f"passes over each stream: books {books:.1f}, general {general / 300:.1f}, web {0.25 * 640 / 25:.1f}",
        "web: read more than 4 times; beyond that repeated text tends to teach little (Muennighoff et al. 2023)",
    )
    assert "epochs" not in render(made)


def test_stages_are_known_before_the_data_are_built_and_one_that_never_begins_is_said() -> None:
    length = {"tokens": 45 * 32 * 128}
    asked = Recipe.model_validate(mixed(stages=STAGES).to_dict() | {"duration": length})
    made = plan(asked, dataset=None)
    assert (made.steps, made.tokens) == (40 + 3, 40 * 32 * 128 + 3 * 32 * 256)
    assert made.notes[-1] == "the run ends before stage 3 begins; raise duration, or shorten the stages before"
    assert not any("passes" in note for note in made.notes)


def test_a_share_of_nothing_is_refused() -> None:
    empty = card(index_card(128, {"books": (10, 1280), "general": (0, 0), "web": (5, 640)}))
    streams = [{"name": name, "source": {"kind": "text", "path": name}} for name in ("books", "general", "web")]
    streams[1]["share"] = 0.5  # type: ignore[assignment]
    refused = plan(mixed(streams=streams), dataset=empty)
    assert [refusal.asked for refusal in refused.refusals] == [
        "stream 'general' of data.streams has share: 0.5, but the stream has no row to train on"
    ]


def test_rejected_answers_are_not_learned_as_if_they_were_good() -> None:
    books = {"name": "books", "source": {"kind": "text", "path": "books"}}
    pairs = {"name": "pairs", "source": {"kind": "jsonl", "path": "pairs", "shape": {"kind": "preference"}}, "split": "never"}
    own = {"name": "own", "source": {"kind": "custom", "factory": "my.pairs:read"}, "split": "never"}
    cards = card(index_card(128, {"books": (10, 1280), "own": (10, 1280)}))
    of_own = replace(cards.indexes[0], streams=(cards.streams[0], replace(cards.streams[1], pairs=True)))
    for streams, dataset, name in (([books, pairs], None, "pairs"), ([books, own], replace(cards, indexes=(of_own,)), "own")):
        refused = plan(mixed(streams=streams), dataset=dataset)
        assert [r.asked for r in refused.refusals] == [f"objective.kind next_token on the preference pairs of {name}"]
    assert not plan(mixed(streams=[books, own]), dataset=cards).refusals


def test_float64_takes_twice_the_disk() -> None:
    assert plan(recipe(precision="fp64")).checkpoint_bytes == 5_000_000 * 24 + 2**20


def test_before_the_data_are_built_steps_are_known_unless_they_are_epochs() -> None:
    unbuilt = plan(dataset=None)
    assert (unbuilt.steps, unbuilt.tokens, unbuilt.steps_per_epoch) == (100, 100 * 32 * 128, 0)
    epochs = plan(recipe(duration={"epochs": 2}), dataset=None)
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


def test_experts_on_several_ranks_of_zero_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FACTS", replace(FACTS, has_mixtures=True))
    asked = recipe(parallel={"kind": "zero", "stage": 2}, batch={"rows": 4})
    (refusal,) = plan(asked, Site(workers=2)).refusals
    assert refusal.asked == "a mixture of experts with parallel.stage 1 or 2 on several ranks"
    assert not plan(asked, Site(workers=1)).refusals


def test_all_refusals_come_at_once() -> None:
    refused = plan(recipe(batch={"rows": 2}), Site(workers=9, device="cuda"), machine(8, gpus=1), free_bytes=0, dataset=CARD)
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
        "note    passes over each stream: a 3.1\n"
        "\n"
        "this run can start"
    )


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (96 * GB, "96.0 GB")])
def test_sizes_read_as_disks_are_sold(count: int, text: str) -> None:
    assert size(count) == text


def test_a_history_of_allocations_is_refused_where_no_device_keeps_one() -> None:
    asked = recipe(profile={"steps": 3, "memory": True})
    made = plan(asked)
    assert [refusal.nearest for refusal in made.refusals] == ["profile.memory=false: the trace of the steps alone"]
    assert not plan(asked, inventory=machine(gpus=1)).refusals
    assert not plan(recipe(profile={"memory": True})).refusals


def test_a_window_of_steps_or_ranks_that_the_run_does_not_have_is_refused() -> None:
    asked = recipe(duration={"steps": 20}, profile={"start_step": 21, "steps": 3, "ranks": [0, 1, 4]})
    assert [refusal.nearest for refusal in plan(asked).refusals] == ["profile.start_step=18", "profile.ranks=[0]"]
    assert not plan(recipe(duration={"steps": 20}, profile={"start_step": 20, "steps": 3})).refusals
    assert not plan(recipe(duration={"steps": 20}, profile={"start_step": 21, "ranks": [7]})).refusals
