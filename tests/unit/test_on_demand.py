"""Commands read documents wherever they lie: the same ones, with little room, and never a wrong byte."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
from text_recipes import make_recipe, make_site, text_stream, write_texts
from token_stores import Dataset as Made
from token_stores import documents, make_dataset

from outgrow.contracts import DatasetCard
from outgrow.errors import IntegrityError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, tree_digests
from outgrow.streaming.build import build
from outgrow.streaming.dropped import dropped
from outgrow.streaming.inspect import first_rows
from outgrow.streaming.report import make_report
from outgrow.streaming.tiers import on_demand
from outgrow.streaming.tiers.on_demand import Dataset, open_dataset
from outgrow.streaming.tiers.places import open_places
from outgrow.streaming.tiers.rate import RateLimit
from outgrow.streaming.tiers.slot import slots

SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    streams = {"a": (documents(1, 120), documents(2, 30)), "b": (documents(3, 60), documents(4, 20))}
    return make_dataset(tmp_path_factory.mktemp("on-demand"), streams)


@pytest.fixture
def remote(made: Made) -> Iterator[str]:
    with_dataset = bucket(made.root)
    yield with_dataset
    fsspec.filesystem("memory").rm(with_dataset.removeprefix("memory:/"), recursive=True)


def bucket(root: Path) -> str:
    """The URL of a new bucket with all files below ``root``."""
    url = f"memory://bucket-{uuid.uuid4().hex}"
    for path in root.rglob("*"):
        if path.is_file():
            Storage(url).upload(path, path.relative_to(root).as_posix())
    return url


def site(storage: str, cache: Path, *tiers: dict[str, Any]) -> Site:
    return Site.model_validate({"storage": storage, "cache": str(cache), "tiers": tiers})


def tier(name: str, path: Path, **keys: Any) -> dict[str, Any]:
    return {"name": name, "path": str(path), "reserve": "0 B", **keys}


def texts(dataset: Dataset) -> list[tuple[str, bytes]]:
    """Source and tokens of every document, to and fro, so that shards come back."""
    found = []
    for stream in ("a", "b"):
        for split in SPLITS:
            own = dataset.documents(stream, split, open_shards=1)
            found += [(own.source(number), own.tokens(number).tobytes()) for number in (*range(len(own)), 0, len(own) - 1, 1)]
    return found


@pytest.fixture(scope="module")
def expected(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    with open_dataset(site(str(made.root), tmp_path_factory.mktemp("unused")), made.card) as dataset:
        return texts(dataset)


def test_a_bucket_is_read_through_a_slot_that_is_free_afterwards(
    made: Made, remote: str, tmp_path: Path, expected: list[tuple[str, bytes]]
) -> None:
    given = site(remote, tmp_path / "cache", tier("nvme", tmp_path / "nvme"))
    hot = open_places(given)[0]
    for _ in range(2):
        with open_dataset(given, made.card) as dataset:
            assert texts(dataset) == expected
            assert [state.leased for state in slots(hot)] == [True]
        assert [state.leased for state in slots(hot)] == [False]


def test_little_room_is_enough(made: Made, remote: str, tmp_path: Path, expected: list[tuple[str, bytes]]) -> None:
    largest = max(path.stat().st_size for path in made.store.rglob("*.mds"))
    given = site(remote, tmp_path / "cache", tier("nvme", tmp_path / "nvme", run_cache=f"{2 * largest} B"))
    with open_dataset(given, made.card) as dataset:
        assert texts(dataset) == expected
        (state,) = slots(open_places(given)[0])
        assert 0 < state.num_bytes <= state.room_bytes == 2 * largest


def test_the_limit_of_the_first_tier_holds_for_what_is_copied_there(
    made: Made, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[float, int]] = []

    class Noted(RateLimit):
        def __init__(self, bytes_per_s: float) -> None:
            super().__init__(bytes_per_s)
            self.bytes_per_s = bytes_per_s

        def take(self, num_bytes: int) -> None:
            taken.append((self.bytes_per_s, num_bytes))
            super().take(num_bytes)

    monkeypatch.setattr(on_demand, "RateLimit", Noted)
    given = site(remote, tmp_path / "cache", tier("nvme", tmp_path / "nvme", limit="50 MB/s"))
    with open_dataset(given, made.card) as dataset:
        texts(dataset)
    assert {limit for limit, _ in taken} == {5e7}
    assert sum(num_bytes for _, num_bytes in taken) == sum(path.stat().st_size for path in made.store.rglob("*.mds"))


def test_a_copy_that_was_damaged_since_is_fetched_again(
    made: Made, remote: str, tmp_path: Path, expected: list[tuple[str, bytes]]
) -> None:
    given = site(remote, tmp_path / "cache", tier("nvme", tmp_path / "nvme"))
    with open_dataset(given, made.card) as dataset:
        texts(dataset)
    for shard in (tmp_path / "nvme/shards").rglob("*.mds"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with open_dataset(given, made.card) as dataset:
        assert texts(dataset) == expected


def test_a_local_place_is_read_where_it_is(made: Made, remote: str, tmp_path: Path, expected: list[tuple[str, bytes]]) -> None:
    given = site(remote, tmp_path / "cache", tier("nvme", tmp_path / "nvme"), tier("hdd", made.root))
    with open_dataset(given, made.card) as dataset:
        assert dataset.store == made.store
        assert texts(dataset) == expected
    assert not (tmp_path / "nvme").exists()


def test_a_shard_that_is_nowhere_whole_is_refused_by_name(made: Made, remote: str, tmp_path: Path) -> None:
    key = "datasets/s/streams/b/train/shard.00000.mds"
    storage = Storage(remote)
    storage.write(key, bytes(len(storage.read(key))))
    given = site(remote, tmp_path / "cache", tier("nvme", tmp_path / "nvme"))
    with open_dataset(given, made.card) as dataset, pytest.raises(IntegrityError, match=r"b/train/shard\.00000\.mds"):
        texts(dataset)
    assert not list((tmp_path / "nvme/shards").rglob("b/train/*")), "no wrong byte stays"


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, DatasetCard, Recipe]:
    root = tmp_path_factory.mktemp("built")
    write_texts(root / "prose", 40)
    (root / "prose" / "again.txt").write_bytes(sorted((root / "prose").iterdir())[0].read_bytes())
    recipe, own = make_recipe(text_stream(), duplicates={"remove": "exact"}), make_site(root, prose=root / "prose")
    return own, build(recipe, own).card, recipe


def test_inspect_dropped_and_report_say_the_same_of_a_bucket(
    built: tuple[Site, DatasetCard, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, card, recipe = built
    monkeypatch.setattr(on_demand, "_MOST_BYTES", 1)  # as little room as can be
    before = tree_digests(Path(here.storage))
    there = here.model_copy(update=dict(site(bucket(Path(here.storage)), tmp_path, tier("nvme", tmp_path / "nvme"))))
    assert list(first_rows(recipe, there, card, 9)) == list(first_rows(recipe, here, card, 9))
    lines = list(dropped(there, card))
    assert lines == list(dropped(here, card)) and lines
    assert make_report(there, card, recipe) == make_report(here, card, recipe)
    assert len(slots(open_places(there)[0])) == 1
    shutil.rmtree(tmp_path)
    assert tree_digests(Path(here.storage)) == before
