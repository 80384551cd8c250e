"""A remote dataset on this node: whole and checked, or not there; fetched once however many ask."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from token_stores import Dataset, documents, layout, make_dataset

from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, tree_digests
from outgrow.streaming.fetch import local_dataset
from outgrow.streaming.loader import build_loader

SHARD = "datasets/s/streams/books/train/shard.00001.mds"


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


def site(remote: str, cache: Path) -> Site:
    return Site.model_validate({"storage": remote, "cache": str(cache)})


def test_the_copy_is_the_original_and_trains_alike(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    folder = local_dataset(site(remote, tmp_path), dataset.card)
    assert folder == tmp_path / "datasets/s"
    assert len(dataset.card.indexes) == 2 and all((tmp_path / index.folder).is_dir() for index in dataset.card.indexes)
    assert tree_digests(folder) == tree_digests(dataset.store)
    here = build_loader(dataset.job(), layout(1), 0, start_step=0, stop_step=3)
    there = build_loader(dataset.job(storage=remote, cache=str(tmp_path)), layout(1), 0, start_step=0, stop_step=3)
    assert [step.row_ids for step in here] == [step.row_ids for step in there]


def test_local_storage_is_read_in_place(dataset: Dataset, tmp_path: Path) -> None:
    assert local_dataset(site(str(dataset.root), tmp_path / "cache"), dataset.card) == dataset.store
    assert not (tmp_path / "cache").exists()


def test_ranks_of_a_node_fetch_once(dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]) -> None:
    ranks = [threading.Thread(target=local_dataset, args=(site(remote, tmp_path), dataset.card)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert SHARD in downloads
    assert len(set(downloads)) == len(downloads)


def test_an_interrupted_fetch_shows_nothing_and_is_taken_up_where_it_stopped(
    dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    storage = Storage(remote)
    whole = storage.read(SHARD)
    storage.remove(SHARD)
    with pytest.raises(IntegrityError, match="shard.00001.mds: the file is missing"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert not (tmp_path / "datasets").exists()
    storage.write(SHARD, whole)
    before, downloads[:] = set(downloads) - {SHARD}, []
    folder = local_dataset(site(remote, tmp_path), dataset.card)
    assert before
    assert not before & set(downloads)
    assert tree_digests(folder) == tree_digests(dataset.store)


def test_a_bad_download_is_fetched_again(
    dataset: Dataset, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, bad = Storage.download, [SHARD, SHARD]

    def flaky(self: Storage, key: str, local: Path) -> None:
        download(self, key, local)
        if key in bad:
            bad.remove(key)
            local.write_bytes(local.read_bytes()[:-1])

    monkeypatch.setattr(Storage, "download", flaky)
    assert tree_digests(local_dataset(site(remote, tmp_path), dataset.card)) == tree_digests(dataset.store)


def test_what_stays_damaged_is_refused_by_name(dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]) -> None:
    storage = Storage(remote)
    storage.write(SHARD, storage.read(SHARD)[:-1] + b"?")
    with pytest.raises(IntegrityError, match="(?s)shard.00001.mds: .*after 3 downloads"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert downloads.count(SHARD) == 3
    assert not (tmp_path / "datasets").exists()


def test_a_damaged_table_of_shards_is_refused_before_a_shard_is_asked_for(
    dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    table = "datasets/s/streams/books/train/shards.safetensors"
    storage = Storage(remote)
    storage.write(table, storage.read(table)[:-1] + b"?")
    with pytest.raises(IntegrityError, match="(?s)shards.safetensors: .*after 3 downloads"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert SHARD not in downloads


def test_a_manifest_that_names_a_file_outside_is_refused(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    import json

    from outgrow.storage import digest

    storage = Storage(remote)
    manifest = storage.read_json("datasets/s/store.json")
    manifest["files"]["../../evil"] = "0" * 64
    text = json.dumps(manifest).encode()
    storage.write("datasets/s/store.json", text)
    storage.write("datasets/s/COMMITTED", digest(text).encode())
    with pytest.raises(DataError, match="outside its folder: ../../evil"):
        local_dataset(site(remote, tmp_path), dataset.card)


def test_a_dataset_that_was_never_committed_is_not_there(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    Storage(remote).remove("datasets/s/COMMITTED")
    with pytest.raises(DataError, match="has no dataset datasets/s"):
        local_dataset(site(remote, tmp_path), dataset.card)


def test_a_cache_without_room_is_refused_before_anything_is_fetched(
    dataset: Dataset, remote: str, tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=dataset.card.bytes - 1))
    with pytest.raises(DataError, match=r"(?s)the dataset takes .* bytes, the cache has .* free.*cache: in site\.yaml"):
        local_dataset(site(remote, tmp_path), dataset.card)
    assert not downloads
