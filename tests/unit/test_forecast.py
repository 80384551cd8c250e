"""``outgrow data simulate``: what it opens and assumes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from token_stores import Dataset, documents, make_dataset

from outgrow.cli import main
from outgrow.cluster.runs import claim
from outgrow.contracts import ShardCounts, StepRecord, TierTraffic
from outgrow.errors import DataError
from outgrow.monitoring.events import EventLog
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.tiers.forecast import Assumptions, Outlook, foresee_reading, look_ahead
from outgrow.streaming.tiers.needs import Needs
from outgrow.streaming.tiers.schedule import Schedule
from outgrow.streaming.tiers.shard_list import ShardList

GIVEN = Assumptions(step_s=0.5, steps=40, cache="50%", bytes_per_s={"hdd": 20_000.0}, latency_s={"hdd": 0.0})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    streams = {"a": (documents(1, 300), documents(2, 20)), "b": (documents(3, 150), [])}
    return make_dataset(tmp_path_factory.mktemp("forecast") / "hdd", streams, shard_bytes=1500)


def make_site(dataset: Dataset, folder: Path, **hdd: Any) -> Site:
    """The dataset on a slow tier, ``folder`` with an empty fast one."""
    tiers = [
        {"name": "nvme", "path": str(folder / "nvme"), "reserve": "0 B"},
        {"name": "hdd", "path": str(dataset.root), **hdd},
    ]
    return Site.model_validate({"schema": 1, "storage": str(dataset.root), "cache": str(folder / "cache"), "tiers": tiers})


def outlook_of(dataset: Dataset, site: Site, given: Assumptions = GIVEN, **recipe: Any) -> Outlook:
    return look_ahead(dataset.recipe(**recipe), site, dataset.card, given)


@contextmanager
def shards_away(dataset: Dataset) -> Iterator[None]:
    """Without the files of the shards."""
    hidden = [path.rename(path.with_suffix(".hidden")) for path in dataset.root.rglob("*.mds")]
    yield
    for path in hidden:
        path.rename(path.with_suffix(".mds"))


def test_the_forecast_is_of_the_plan_of_the_run_and_reads_no_shard(dataset: Dataset, tmp_path: Path) -> None:
    site = make_site(dataset, tmp_path)
    with shards_away(dataset):
        found = outlook_of(dataset, site)
    folder = dataset.root / dataset.card.store
    shards = ShardList.open(folder, ["a", "b"])
    index = RowIndex.open(dataset.root / dataset.card.indexes[0].folder)
    needs = Needs([index], Mix.of(dataset.recipe(), dataset.card), dataset.seed, shards)
    plan = Schedule(needs, shards.num_bytes, capacity=found.room.planned, start=0, stop=40, present={})
    fetches = list(plan)
    ahead = found.prefetched
    assert (ahead.visits, ahead.hits, ahead.misses) == (plan.counts.visits, plan.counts.hits, plan.counts.misses)
    pinned = shards.numbers(0, "validation")
    assert ahead.fetches == len(fetches) + len(pinned)
    assert ahead.fetched_bytes == shards.num_bytes[[one.shard for one in fetches]].sum() + shards.num_bytes[pinned].sum()
    assert found.room.total == round(shards.num_bytes.sum() / 2)
    assert found.on_demand.hits == ahead.hits and found.on_demand.stall_s > ahead.stall_s
    assert not list((tmp_path / "nvme").rglob("*.mds"))


def test_what_a_run_would_get_is_the_cache_where_none_is_given(dataset: Dataset, tmp_path: Path) -> None:
    site = make_site(dataset, tmp_path)
    every = sum(path.stat().st_size for path in (dataset.root / dataset.card.store).rglob("*.mds"))
    assert outlook_of(dataset, site, replace(GIVEN, cache=None)).room.total == every
    tier = site.tiers[0].model_copy(update={"run_cache": "40 kB"})
    small = site.model_copy(update={"tiers": (tier, *site.tiers[1:])})
    assert outlook_of(dataset, small, replace(GIVEN, cache=None)).room.total == 40_000


def test_speeds_are_given_declared_or_measured_and_never_above_the_limit(dataset: Dataset, tmp_path: Path) -> None:
    def source(given: Assumptions, **hdd: Any) -> tuple[float, float]:
        found = outlook_of(dataset, make_site(dataset, tmp_path, **hdd), given).source
        return found.bytes_per_s, found.latency_s

    silent = replace(GIVEN, bytes_per_s={}, latency_s={})
    assert source(GIVEN, speed="1 MB/s") == (20_000.0, 0.0)
    assert source(silent, speed="1 MB/s") == (1e6, 0.01)
    assert source(silent, speed="1 MB/s", limit="10 kB/s") == (1e4, 0.01)
    with pytest.raises(DataError, match="how fast 'hdd' reads is not known") as caught:
        source(silent)
    assert "--speed 'hdd=180 MB/s'" in str(caught.value)
    slot = tmp_path / "nvme/shards/s.0"
    slot.mkdir(parents=True)
    (slot / "LEASE").touch()
    counts = ShardCounts(tiers={"hdd": TierTraffic(shards=3, bytes=5000, read_s=0.5)})
    (slot / "counts.json").write_text(json.dumps(counts.to_dict()))
    assert source(silent) == (10_000.0, 0.0)


def test_a_loader_is_ahead_by_what_its_workers_have_read_and_pack(dataset: Dataset, tmp_path: Path) -> None:
    site = make_site(dataset, tmp_path)
    assert outlook_of(dataset, site).pace.ahead_steps == 0
    assert outlook_of(dataset, site, workers=2).pace.ahead_steps == 2 * 9


def test_a_cache_that_is_enough_is_told_where_this_one_is_not(dataset: Dataset, tmp_path: Path) -> None:
    site = make_site(dataset, tmp_path)
    steps = replace(GIVEN, steps=None, cache="30%")
    recipe = {"duration": {"epochs": 3}}
    slow = outlook_of(dataset, site, steps, **recipe)
    pace = replace(steps, step_s=0.95 * slow.pace.step_s * slow.prefetched.load)
    found = outlook_of(dataset, site, pace, **recipe)
    assert not found.keeps_up and found.enough_bytes is not None
    enough = outlook_of(dataset, site, replace(pace, cache=f"{found.enough_bytes} B"), **recipe)
    assert enough.keeps_up and enough.enough_bytes is None
    hopeless = outlook_of(dataset, site, replace(pace, step_s=0.001), **recipe)
    assert hopeless.enough_bytes is None and hopeless.all_kept.load > 1


def test_what_lies_whole_on_the_first_tier_too_needs_no_room_there(dataset: Dataset, tmp_path: Path) -> None:
    """A run reads it under second names (``Slot.present``), however little room is left."""
    tiers = [
        {"name": "nvme", "path": str(dataset.root), "capacity": "1 B"},
        {"name": "hdd", "path": str(tmp_path / "hdd"), "speed": "1 MB/s"},
    ]
    shutil.copytree(dataset.root, tmp_path / "hdd")
    given = {"schema": 1, "storage": str(tmp_path / "hdd"), "cache": str(tmp_path / "cache"), "tiers": tiers}
    site = Site.model_validate(given)
    told = foresee_reading(dataset.recipe(), site, dataset.card)
    assert (told.note, told.refusal) == ("the dataset is read where it lies, at nvme", None)
    with pytest.raises(DataError, match="read where it lies: no shard is copied"):
        outlook_of(dataset, site, replace(GIVEN, bytes_per_s={}, latency_s={}))


def test_what_cannot_be_forecast_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    site = make_site(dataset, tmp_path)
    with pytest.raises(DataError, match="^--speed: there is no tier 'usb'; tiers: nvme, hdd$"):
        outlook_of(dataset, site, replace(GIVEN, bytes_per_s={"usb": 1.0}))
    with pytest.raises(DataError, match="^--cache: the cache for shards has 100 bytes; the smallest that works has "):
        outlook_of(dataset, site, replace(GIVEN, cache="100 B"))
    in_place = Site.model_validate({"schema": 1, "storage": str(dataset.root), "cache": str(tmp_path)})
    with pytest.raises(DataError, match="read where it lies: no shard is copied"):
        outlook_of(dataset, in_place, replace(GIVEN, bytes_per_s={}, latency_s={}))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulate(dataset: Dataset, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs the command on the dataset; gives its exit code and what it printed."""
    for stream in dataset.streams:
        (tmp_path / stream).mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataset.recipe().to_dict()))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(make_site(dataset, tmp_path).to_dict()))
    monkeypatch.setattr("outgrow.streaming.build.find", lambda recipe, site: dataset.card)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["data", "simulate", str(tmp_path / "recipe.yaml"), "--site", str(tmp_path / "site.yaml"), *words])
        out = capsys.readouterr()
        return int(caught.value.code or 0), out.out, " ".join(out.err.split())

    return run


SPEED = ("--speed", "hdd=20 kB/s", "--latency", "hdd=0", "--cache", "50%", "--steps", "40")


def test_the_command_says_whether_the_source_keeps_up(simulate: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = simulate(*SPEED, "--step-s", "2")
    assert code == 0 and "source       hdd: 20.0 kB/s, 1 at once\n" in out
    assert out.splitlines()[-1].startswith("hdd keeps up: the run waits ")
    code, out, _ = simulate(*SPEED, "--step-s", "0.01")
    assert code == 0 and out.splitlines()[-1].startswith("hdd does not keep up: ")
    code, out, _ = simulate("--speed", "hdd=20 kB/s", "--step-s", "0.01", "--cache", "20%")
    assert re.search(
        r"^hdd does not keep up: .* time, and needs \d\.\dx what hdd reads meanwhile; with a cache for all", out, re.M
    )


def test_the_command_gives_the_figures_as_json(simulate: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = simulate(*SPEED, "--step-s", "2", "--json")
    figures = json.loads(out)
    assert code == 0 and figures["keeps_up"] and figures["source"]["bytes_per_s"] == 20_000
    assert (
        figures["prefetched"]["steps"] == 40
        and 0 <= figures["prefetched"]["stall_share"] < 0.02 < figures["on_demand"]["stall_share"]
    )


def test_a_step_takes_what_it_took_when_the_recipe_was_run(
    simulate: Callable[..., tuple[int, str, str]], dataset: Dataset
) -> None:
    code, _, err = simulate(*SPEED)
    assert code == 2 and "how long a step takes is not known" in err and "--step-s SECONDS" in err
    storage = Storage(str(dataset.root))
    with claim(storage, dataset.recipe(), dataset.card.data_fingerprint, fresh=False, accept=False) as claimed:
        log = EventLog(storage, claimed.run.folder)
        for number, wait_s in enumerate((0.5, 1.0, 0.0)):
            log.write(StepRecord(kind="step", attempt="a", time=0.0, step=number, steps=9, step_s=2.0, data_wait_s=wait_s))
        log.close()
    code, out, _ = simulate(*SPEED, "--json")
    assert code == 0 and json.loads(out)["pace"]["step_s"] == 1.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cache", "half"), "or a share of the shards, such as 25%"),
        (("--speed", "hdd"), "given 'hdd'; allowed: TIER=VALUE"),
        (("--speed", "hdd=fast"), "allowed: a rate such as 180 MB/s"),
        (("--latency", "hdd=-1"), "allowed: seconds, such as 0.012"),
        (("--step-s", "0"), "allowed: seconds above 0"),
    ],
)
def test_options_are_checked(simulate: Callable[..., tuple[int, str, str]], words: tuple[str, str], said: str) -> None:
    code, _, err = simulate("--step-s", "1", *words)
    assert code == 2 and said in err
