"""The storage view and fetching on Google Cloud Storage, served by an emulator in a process of its own; needs ``gcsfs``."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, serving

from outgrow.recipes.schema.tiers import Tier
from outgrow.retry import Unreachable
from outgrow.storage import BLOCK_BYTES, Storage
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.shard_list import ShardFile
from outgrow.streaming.tiers.transfer import Fetcher, copy_verified

# gcsfs hands its bodies to aiohttp as bytes.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
DATA = random.Random(0).randbytes(BLOCK_BYTES + 1000)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        # Read when gcsfs is imported: the emulator has no gRPC side, which would be asked for the kind of the bucket.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    words = ["gcp_storage_emulator", "start", "--host=127.0.0.1", "--in-memory", "--default-bucket=bucket"]
    with serving(lambda port: [*words, f"--port={port}"]) as url:
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy: FaultProxy) -> Storage:
    return Storage("gs://bucket/some/prefix", {"endpoint_url": proxy.url, "token": "anon"})


def test_the_storage_view_means_the_same(storage: Storage) -> None:
    storage.write("d/a", b"0123456789")
    storage.write("d/sub/b", b"12")
    assert storage.names("d") == ["a", "sub"] and storage.sizes("d") == {"a": 10}
    assert storage.read("d/a") == b"0123456789"
    assert storage.read_range("d/a", 8, 50) == b"89" and storage.read_range("d/a", 10, 50) == b""
    assert storage.names("absent") == [] and not storage.exists("absent")
    with pytest.raises(FileNotFoundError):
        storage.read("absent")
    with storage.open_write("d/streamed") as file:
        file.write(DATA)
    assert b"".join(storage.blocks("d/streamed")) == DATA
    assert storage.create("d/lock", b"first") and not storage.create("d/lock", b"second")
    storage.rename("d", "e/f")
    assert storage.names("d") == [] and storage.names("e/f") == ["a", "lock", "streamed", "sub"]
    storage.remove("e")
    storage.remove("e")
    assert not storage.exists("e/f/a")


def test_a_shard_is_fetched_through_faults(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    storage.write("datasets/ab12/shard", DATA)
    place = Place(name="gcs", storage=storage, tier=Tier(name="gcs", path=storage.root_url))
    file = ShardFile(name="shard", num_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    proxy.fault("reset", times=1, method="GET", path="shard?alt=media")
    proxy.fault("flip", times=1, method="GET", path="shard?alt=media")
    fetcher = Fetcher([place], "datasets/ab12", give_up_s=30)
    assert fetcher.fetch(file, tmp_path / "a") == "gcs"
    assert (tmp_path / "a").read_bytes() == DATA
    assert fetcher.traffic.snapshot()["gcs"].errors["corrupt"] == 1


def test_copies_are_verified_both_ways(storage: Storage, tmp_path: Path) -> None:
    disk = Storage(str(tmp_path))
    disk.write("a", DATA)
    for source, target in ((disk, storage), (storage, disk)):
        copied = copy_verified(source, "a", target, "a", expected=None, limiter=None, on_bytes=lambda _: None)
        assert copied == hashlib.sha256(DATA).hexdigest()


def test_a_bucket_that_is_away_ends_in_bounded_time(proxy: FaultProxy, storage: Storage) -> None:
    start = time.monotonic()
    with proxy.absent(), pytest.raises(Unreachable, match="cannot look for a"):
        storage.with_patience(1).exists("a")
    assert time.monotonic() - start < 25
