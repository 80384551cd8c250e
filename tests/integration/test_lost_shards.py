"""Runs that meet a shard which no place has whole: stopped in plain words, or gone on without its rows, on every rank alike."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import train as oracle_train
from text_recipes import write_texts
from tiny_runs import Place, tiny_place
from token_stores import Dataset, layout
from training_jobs import CONFIG, TRAIN_WORKER, curve, job, records, two_streams

from outgrow.cluster.local import run_local
from outgrow.contracts import JobSpec, RunResult
from outgrow.errors import IntegrityError, ShardError
from outgrow.recipes.schema import Recipe
from outgrow.storage import Storage
from outgrow.streaming.loader import build_loader
from outgrow.streaming.lost_shards import LostShard, lost_documents
from outgrow.streaming.quarantine import read_losses
from outgrow.streaming.rows import RowIndex
from outgrow.trainers.schedule import learning_rate

STEPS = 16
"""An epoch has 13."""
BAD = LostShard(stream="a", shard=4)
"""Steps 5 to 8 read it, 18 to 21 again."""
EXACT = {"precision": "fp64"}
"""Tells rounding from other rows."""
UNLIKE: dict[str, Any] = {"checkpoint": "", "seconds": 0.0, "best": None}
"""What two runs that learn the same may differ in."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return two_streams(tmp_path)


def quarantined(dataset: Dataset, run: str, steps: int = STEPS, *, loader_workers: int = 0, **settings: Any) -> JobSpec:
    spec = job(dataset, run, steps, loader_workers=loader_workers, **settings)
    spec.recipe["data"] = {**spec.recipe["data"], "on_bad_shard": "quarantine"}
    return spec


def run(spec: JobSpec) -> RunResult:
    return run_local(spec, TRAIN_WORKER, on_record=lambda record: None)


def shard_file(dataset: Dataset, shard: LostShard) -> Path:
    return dataset.store / f"streams/{shard.stream}/train/shard.{shard.shard:05}.mds"


def damage(dataset: Dataset, shard: LostShard) -> None:
    """Flip a byte in the middle."""
    path = shard_file(dataset, shard)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lost(dataset: Dataset, run: str) -> list[LostShard]:
    return [LostShard(stream=loss.stream, shard=loss.shard) for loss in read_losses(Storage(str(dataset.root)), f"runs/{run}")]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.tiers)])
def test_a_bad_shard_stops_the_run_or_is_given_up_as_if_that_had_been_known_from_the_start(
    dataset: Dataset, ranks: int
) -> None:
    """Bit by bit, with loader workers that read ahead. The other run cannot have used the shard: it is gone."""
    damage(dataset, BAD)
    with pytest.raises(ShardError) as caught:
        run(job(dataset, "stopped", 10, loader_workers=1))
    assert str(caught.value) == (
        f"{shard_file(dataset, BAD)}: shard 4 of stream 'a' is whole in no place: the bytes differ from their sha256 digest\n"
        "  repair it: outgrow data verify names every damaged file, outgrow data place shows which places have a whole one; "
        "or go on without its rows: the same command with data.on_bad_shard=quarantine"
    )
    assert not lost(dataset, "stopped")

    found = run(quarantined(dataset, "found", 10, workers=ranks, loader_workers=1, **EXACT))
    assert found.restarts == 1
    assert lost(dataset, "found") == [BAD]
    starts = [start.detail.get("lost_shards") for start in records(dataset, "found", "start")]
    assert starts == [None, [{"stream": "a", "shard": 4}]]

    shard_file(dataset, BAD).unlink()
    shutil.copytree(dataset.root / "runs/found/quarantine", dataset.root / "runs/knew/quarantine")
    knew = run(quarantined(dataset, "knew", 10, workers=ranks, **EXACT))
    assert knew.restarts == 0
    assert curve(dataset, "found") == curve(dataset, "knew")
    assert dataclasses.replace(found.worker, **UNLIKE) == dataclasses.replace(knew.worker, **UNLIKE)

    shutil.copytree(dataset.root / "runs/found/quarantine", dataset.root / "runs/alone/quarantine")
    alone = run(quarantined(dataset, "alone", **EXACT))
    moved = run(job(dataset, "found", STEPS, **EXACT))  # what was given up is so under ``stop`` too
    assert (moved.restarts, moved.worker.tokens) == (0, alone.worker.tokens)
    for step, (loss, norm) in curve(dataset, "alone").items():
        assert curve(dataset, "found")[step] == pytest.approx((loss, norm), rel=0, abs=1e-9)


def test_losses_are_those_of_the_oracle_without_the_lost_rows(dataset: Dataset, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**CONFIG, vocab_size=dataset.card.vocab_size, eos_token_id=dataset.card.eos_token_id)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    spec = quarantined(dataset, "oracle", model={"kind": "folder", "path": "weights"}, **EXACT)
    spec.site["sources"] = {"weights": str(tmp_path / "model")}
    steps = list(documents_left(dataset, spec))
    damage(dataset, BAD)
    run(spec)
    recipe = Recipe.model_validate(spec.recipe)
    losses, norms, _ = oracle_train(
        config,
        load_file(tmp_path / "model/model.safetensors"),
        steps,
        rates=[learning_rate(recipe, step, STEPS) for step in range(STEPS)],
        dtype=torch.float64,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        clip_norm=recipe.optimizer.clip_norm,
    )
    assert [pair[0] for pair in curve(dataset, "oracle").values()] == pytest.approx(losses, rel=0, abs=1e-9)
    assert [pair[1] for pair in curve(dataset, "oracle").values()] == pytest.approx(norms, rel=0, abs=1e-9)


def documents_left(dataset: Dataset, spec: JobSpec) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Of each step, read from the whole dataset, what every segment of the rows holds that do not touch the bad shard."""
    index = RowIndex.open(dataset.index)
    (gone,) = lost_documents(dataset.store, [BAD])["a"]
    left_out = 0
    for step in build_loader(spec, layout(1), 0, start_step=0, stop_step=STEPS):
        documents = []
        for batch in step.micro_batches:
            for place, row in enumerate(batch.row_ids.tolist()):
                if row < 0:
                    continue  # keeps a short step's micro-batches alike
                if row < index.train[0].num_rows and any(span.document in gone for span in index.train[0].spans(row)):
                    left_out += 1
                    continue
                for segment in range(int(batch.segments[place].max()) + 1):
                    own = batch.segments[place] == segment
                    documents.append((batch.token_ids[place][own], batch.targets[place][own], batch.weights[place][own]))
        yield documents
    assert left_out > 10


def test_a_shard_that_turns_bad_in_the_second_pass_is_given_up_from_the_newest_checkpoint_on(dataset: Dataset) -> None:
    """What had been learned of it stays learned; the steps that are done again are done without it."""
    saved: dict[str, Any] = {"checkpoint": {"every_steps": 4, "keep_newest": 20}}
    settings: dict[str, Any] = {"duration": {"steps": 26}, **saved}
    run(quarantined(dataset, "late", 12, **saved))
    damage(dataset, BAD)
    result = run(quarantined(dataset, "late", **settings))
    assert (result.restarts, lost(dataset, "late")) == (1, [BAD])
    first, second, again = [start.step for start in records(dataset, "late", "start")]
    assert (first, second) == (0, 12) and again >= 12, "a busy disk puts a save off by a step or more"

    folders = dataset.root / "runs/twin"
    shutil.copytree(dataset.root / "runs/late/quarantine", folders / "quarantine")
    shutil.copytree(dataset.root / f"runs/late/checkpoints/step-{again:08d}", folders / f"checkpoints/step-{again:08d}")
    run(quarantined(dataset, "twin", **settings))
    assert list(curve(dataset, "twin")) == list(range(again + 1, 27))
    assert curve(dataset, "twin").items() <= curve(dataset, "late").items()


def test_bad_shards_are_given_up_one_after_the_other_until_there_are_too_many(dataset: Dataset) -> None:
    """Half of the nine may go."""
    for shard in range(4):
        damage(dataset, LostShard(stream="a", shard=shard))
    assert run(quarantined(dataset, "several")).restarts == 4
    assert lost(dataset, "several") == [LostShard(stream="a", shard=shard) for shard in range(4)]

    damage(dataset, LostShard(stream="b", shard=0))
    with pytest.raises(IntegrityError, match="a run may give up 4 of 9 training shards, and this one has given up 4"):
        run(quarantined(dataset, "several", 2 * STEPS))
    assert len(lost(dataset, "several")) == 4


def test_a_run_that_reads_through_a_tier_gives_up_what_no_place_has_whole(dataset: Dataset, tmp_path: Path) -> None:
    """Shard 4 is damaged in both places; shard 0 of the other stream in one, which costs nothing."""
    kept = tmp_path / "kept"
    shutil.copytree(dataset.root / "datasets", kept / "datasets")
    damage(dataset, BAD)
    damage(dataset, LostShard(stream="b", shard=0))
    twin = kept / shard_file(dataset, BAD).relative_to(dataset.root)
    twin.write_bytes(twin.read_bytes()[:-1] + b"?")
    spec = quarantined(dataset, "tiered", loader_workers=1, **EXACT)
    spec.site["tiers"] = [
        {"name": "nvme", "path": str(tmp_path / "nvme"), "reserve": "0 B"},
        {"name": "kept", "path": str(kept)},
    ]
    (tmp_path / "nvme").mkdir()
    assert run(spec).restarts == 1
    assert lost(dataset, "tiered") == [BAD]

    shutil.copy(kept / "datasets/s/streams/b/train/shard.00000.mds", shard_file(dataset, LostShard(stream="b", shard=0)))
    assert run(quarantined(dataset, "in-place", **EXACT)).restarts == 1
    assert curve(dataset, "tiered") == curve(dataset, "in-place")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with tiny_place(tmp_path) as made:
        shutil.rmtree(tmp_path / "words")
        write_texts(tmp_path / "words", 300, num_words=200)
        yield made


@pytest.mark.tiers
@pytest.mark.timeout(600)
def test_outgrow_train_gives_up_a_shard_and_shows_it(place: Place) -> None:
    words = ["recipe.yaml", "schedule.options.seconds=0", "data.shard_bytes=65536", "data.window_shards=1", "batch.rows=200"]
    place.run("data", "build", *words)
    (store,) = (place.folder / "storage/datasets").glob("*/streams")
    files = sorted((store / "words/train").glob("shard.*.mds"))
    assert len(files) >= 8
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = place.run("train", *words, "data.on_bad_shard=quarantine", timeout_s=400)
    assert said.count("the run gives up") == 1
    assert "starting again from the newest checkpoint\n" in said
    starts = [record.detail.get("lost_shards") for record in place.records() if record.kind == "start"]
    assert starts[-2:] == [None, [{"stream": "words", "shard": 0}]]
    (run_folder,) = (place.folder / "storage/runs").iterdir()
    shown = place.run("runs", "show", run_folder.name)
    assert [line for line in shown.splitlines() if line.startswith("lost shard  words 0: ") and "tokens" in line]
    assert shown.count("lost shard") == 1
