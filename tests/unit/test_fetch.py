"""A dataset that is read through a tier: on this node are its store and indexes without the shards, checked, or nothing."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from token_stores import Dataset, documents, make_dataset

from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.site import Site
from outgrow.retry import Patience, Unreachable
from outgrow.storage import Storage, digest, tree_digests
from outgrow.streaming.fetch import index_folder, local_dataset
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.store import read_store
from outgrow.streaming.tiers import reading
from outgrow.streaming.tiers.reading import open_reading

TABLE = "datasets/s/streams/books/train/shards.safetensors"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A store with an index for rows of 32 tokens and one for rows of 48."""
    stages = [{"tokens": 448, "shares": {"books": 1}}, {"shares": {"books": 1}, "sequence_length": 48}]
    streams = {"books": (documents(1, 130), documents(2, 9))}
    return make_dataset(tmp_path_factory.mktemp("fetch"), streams, data={"stages": stages}, part_documents=50)


@pytest.fixture
def remote(dataset: Dataset) -> Iterator[str]:
    """The dataset in a bucket of its own."""
    url = f"memory://bucket-{uuid.uuid4().hex}"
    storage = Storage(url)
    for path in dataset.root.rglob("*"):
        if path.is_file():
            storage.upload(path, path.relative_to(dataset.root).as_posix())
    yield url
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that were downloaded, in order."""
    keys: list[str] = []
    download = Storage.download

    def counted(self: Storage, key: str, local: Path) -> None:
        keys.append(key)
        download(self, key, local)

    monkeypatch.setattr(Storage, "download", counted)
    return keys


def site(storage: str, cache: Path, *tiers: dict[str, Any]) -> Site:
    return Site.model_validate({"storage": storage, "cache": str(cache), "tiers": tiers})


def without_shards(dataset: Dataset) -> dict[str, str]:
    return {name: sha256 for name, sha256 in tree_digests(dataset.store).items() if not name.endswith(".mds")}


# --- what is copied ---------------------------------------------------------------------------------------------------


def test_the_copy_is_the_original_without_its_shards(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    folder = local_dataset(site(remote, tmp_path), dataset.card)
    assert folder == tmp_path / "mirror/datasets/s"
    assert tree_digests(folder) == without_shards(dataset)
    assert read_store(folder) == read_store(dataset.store)
    assert len(dataset.card.indexes) == 2
    for index in dataset.card.indexes:
        assert RowIndex.open(index_folder(folder, dataset.card, index)).facts.fingerprint == index.fingerprint


def test_ranks_of_a_node_fetch_once(dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]) -> None:
    ranks = [threading.Thread(target=local_dataset, args=(site(remote, tmp_path), dataset.card)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert TABLE in downloads
    assert len(set(downloads)) == len(downloads)


def test_an_interrupted_fetch_shows_nothing_and_is_taken_up_where_it_stopped(
    dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    storage = Storage(remote)
    whole = storage.read(TABLE)
    storage.remove(TABLE)
    with pytest.raises(IntegrityError, match=r"train/shards\.safetensors: the file is missing"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert not (tmp_path / "mirror/datasets").exists()
    storage.write(TABLE, whole)
    before, downloads[:] = set(downloads) - {TABLE}, []
    folder = local_dataset(site(remote, tmp_path), dataset.card)
    assert before
    assert not before & set(downloads)
    assert tree_digests(folder) == without_shards(dataset)


def test_a_bad_download_is_fetched_again(
    dataset: Dataset, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, bad = Storage.download, [TABLE, TABLE]

    def flaky(self: Storage, key: str, local: Path) -> None:
        download(self, key, local)
        if key in bad:
            bad.remove(key)
            local.write_bytes(local.read_bytes()[:-1])

    monkeypatch.setattr(Storage, "download", flaky)
    assert tree_digests(local_dataset(site(remote, tmp_path), dataset.card)) == without_shards(dataset)


def test_what_stays_damaged_is_refused_by_name(dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]) -> None:
    storage = Storage(remote)
    storage.write(TABLE, storage.read(TABLE)[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"(?s)train/shards\.safetensors: .*after 3 downloads"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert downloads.count(TABLE) == 3
    assert not (tmp_path / "mirror/datasets").exists()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a\\b", "a\0b"])
def test_a_manifest_that_names_a_file_outside_is_refused(dataset: Dataset, remote: str, tmp_path: Path, name: str) -> None:
    storage = Storage(remote)
    manifest = storage.read_json("datasets/s/store.json")
    manifest["files"][name] = "0" * 64
    text = json.dumps(manifest).encode()
    storage.write("datasets/s/store.json", text)
    storage.write("datasets/s/COMMITTED", digest(text).encode())
    with pytest.raises(DataError, match="outside its folder: '.*'"):
        local_dataset(site(remote, tmp_path), dataset.card)


def test_a_cache_without_room_is_refused_before_anything_is_fetched(
    dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = json.loads((dataset.store / "store.json").read_bytes())["files"]
    num_bytes = sum((dataset.store / name).stat().st_size for name in names)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=num_bytes - 1))
    with pytest.raises(DataError, match=rf"(?s)takes {num_bytes:,} bytes, the cache has .* free.*cache: in site\.yaml"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert not downloads


# --- from where it is read --------------------------------------------------------------------------------------------


def test_local_storage_is_read_in_place(dataset: Dataset, tmp_path: Path) -> None:
    found = open_reading(site(str(dataset.root), tmp_path / "cache"), dataset.card)
    assert (found.store, found.hot) == (dataset.store, None)
    assert not (tmp_path / "cache").exists()


def test_storage_that_is_the_first_tier_is_read_in_place(dataset: Dataset, tmp_path: Path) -> None:
    tiers = [{"name": "nvme", "path": str(dataset.root)}, {"name": "usb", "path": str(tmp_path / "usb")}]
    found = open_reading(site(str(dataset.root), tmp_path / "cache", *tiers), dataset.card)
    assert (found.store, found.hot) == (dataset.store, None)


def test_a_slower_tier_is_read_through_the_first(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    tiers = [
        {"name": "nvme", "path": str(tmp_path / "nvme")},
        {"name": "hdd", "path": str(dataset.root)},
        {"name": "usb", "path": str(tmp_path / "usb")},
    ]
    found = open_reading(site(remote, tmp_path / "cache", *tiers), dataset.card)
    assert found.hot is not None and found.hot.name == "nvme"
    assert [place.name for place in found.holders] == ["hdd", "storage"]
    assert tree_digests(found.store) == without_shards(dataset)


def test_a_copy_on_the_first_tier_is_a_holder_like_others(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    tiers = [{"name": "nvme", "path": str(dataset.root)}]
    found = open_reading(site(remote, tmp_path / "cache", *tiers), dataset.card)
    assert found.hot is not None
    assert [place.name for place in found.holders] == ["nvme", "storage"]


def test_without_tiers_a_bucket_is_read_through_the_cache(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    for _ in range(2):  # what was copied there the first time does not pass for the dataset
        found = open_reading(site(remote, tmp_path), dataset.card)
        assert found.hot is not None and found.hot.folder == tmp_path
        assert [place.name for place in found.holders] == ["storage"]


def test_a_dataset_that_was_never_committed_is_not_there(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    Storage(remote).remove("datasets/s/COMMITTED")
    with pytest.raises(DataError, match="has no dataset datasets/s under .* or memory://"):
        local_dataset(site(remote, tmp_path), dataset.card)


def test_a_damaged_file_is_taken_from_another_place(
    dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    copy = tmp_path / "hdd"
    shutil.copytree(dataset.store, copy / "datasets/s")
    (copy / TABLE).write_bytes(b"?" * (copy / TABLE).stat().st_size)
    tiers = [{"name": "nvme", "path": str(tmp_path / "nvme")}, {"name": "hdd", "path": str(copy)}]
    found = open_reading(site(remote, tmp_path / "cache", *tiers), dataset.card)
    assert tree_digests(found.store) == without_shards(dataset)
    assert downloads.count(TABLE) == 4, "three times from the disk, once from the bucket"


def test_a_place_without_its_manifest_is_passed_over_for_another(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    copy = tmp_path / "hdd"
    shutil.copytree(dataset.store, copy / "datasets/s")
    (copy / "datasets/s/store.json").unlink()
    tiers = [{"name": "nvme", "path": str(tmp_path / "nvme")}, {"name": "hdd", "path": str(copy)}]
    found = open_reading(site(remote, tmp_path / "cache", *tiers), dataset.card)
    assert tree_digests(found.store) == without_shards(dataset)
    with pytest.raises(IntegrityError, match=r"datasets/s/store\.json: the file is missing"):
        open_reading(site(str(copy), tmp_path / "other", *tiers), dataset.card)


def test_a_disk_that_cannot_be_read_is_passed_over_for_another(
    dataset: Dataset, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Storage.read

    def failing(self: Storage, key: str) -> bytes:
        if self.is_local and key.endswith("store.json"):
            raise OSError(errno.EIO, "Input/output error")
        return read(self, key)

    monkeypatch.setattr(Storage, "read", failing)
    tiers = [{"name": "nvme", "path": str(tmp_path / "nvme")}, {"name": "hdd", "path": str(dataset.root)}]
    found = open_reading(site(remote, tmp_path / "cache", *tiers), dataset.card)
    assert tree_digests(found.store) == without_shards(dataset)


def test_a_bucket_that_does_not_answer_stops_nothing_that_is_here(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_ASK_S", 0.2)
    monkeypatch.setattr("outgrow.storage.PATIENCE", Patience(total_s=0.2))
    nobody = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}
    tiers = [{"name": "nvme", "path": str(tmp_path / "nvme")}, {"name": "hdd", "path": str(dataset.root)}]
    given = {"storage": "s3://gone/prefix", "storage_options": nobody, "cache": str(tmp_path / "cache")}
    far = {"name": "far", "path": "s3://far", "options": nobody}
    found = open_reading(Site.model_validate(given | {"tiers": [*tiers, far]}), dataset.card)
    assert [place.name for place in found.holders] == ["hdd", "storage"], "the storage may have it; nothing is known of far"
    alone = Site.model_validate(given | {"tiers": tiers[:1]})
    assert [place.name for place in open_reading(alone, dataset.card).holders] == ["storage"], "store and indexes are here"
    with pytest.raises(Unreachable, match="s3://gone/prefix: cannot look for datasets/s/COMMITTED"):
        open_reading(alone.model_copy(update={"cache": str(tmp_path / "other")}), dataset.card)
