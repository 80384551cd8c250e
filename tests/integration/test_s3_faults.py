"""A bucket that fails in every way: what passes is passed over, what does not ends in bounded time with a plain message.

A real S3 server in a process of its own; faults come from a proxy before it (``fault_proxy``).
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy, s3_options, s3_server, s3_storage

from outgrow import multipart
from outgrow.errors import IntegrityError, OutgrowError, SiteError
from outgrow.recipes.schema.tiers import Tier
from outgrow.retry import Unreachable
from outgrow.storage import BLOCK_BYTES, Storage
from outgrow.streaming.tiers import blocks
from outgrow.streaming.tiers.partial import PART
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.shard_list import ShardFile
from outgrow.streaming.tiers.transfer import Corrupt, Fetcher, copy_verified

STORE = "datasets/ab12"
NAME = "streams/text/train/shard.00000.mds"
DATA = random.Random(0).randbytes(3 * BLOCK_BYTES)
FILE = ShardFile(name=NAME, num_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
SECRETS = tuple(str(s3_options("")[name]) for name in ("key", "secret"))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        s3_storage(url).write(f"{STORE}/{NAME}", DATA)
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy: FaultProxy) -> Storage:
    storage = s3_storage(proxy.url)
    proxy.clear()
    return storage


def bucket(storage: Storage) -> Place:
    return Place(name="s3", storage=storage, tier=Tier(name="s3", path=storage.root_url))


def failure(action: Callable[[], Any], within_s: float) -> OutgrowError:
    """The error that ends ``action``, which must come in time and hold no secret in any of its texts."""
    start = time.monotonic()
    with pytest.raises(OutgrowError) as caught:
        action()
    assert time.monotonic() - start < within_s
    texts = [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert not [secret for secret in SECRETS for text in texts if secret in text]
    return caught.value


# --- fetching a shard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "counted"),
    [
        ("status", {"status": 500, "code": "InternalError"}, {"5xx": 2}),
        ("status", {"status": 503, "code": "SlowDown"}, {"throttled": 2}),
        ("reset", {}, {"reset": 2}),
        ("flip", {}, {"corrupt": 1}),
    ],
)
def test_faults_that_pass_are_passed_over_and_counted(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, kind: Any, options: dict[str, Any], counted: dict[str, int]
) -> None:
    proxy.fault(kind, times=2, method="GET", path=NAME, **options)
    fetcher = Fetcher([bucket(storage)], STORE, give_up_s=30)
    start = time.monotonic()
    assert fetcher.fetch(FILE, tmp_path / "a") == "s3"
    assert time.monotonic() - start < 15
    assert (tmp_path / "a").read_bytes() == DATA
    assert fetcher.traffic.snapshot()["s3"].errors == counted


def test_a_broken_block_alone_is_asked_for_again(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    proxy.fault("reset", times=1, method="GET", path=NAME)
    Fetcher([bucket(storage)], STORE).fetch(FILE, tmp_path / "a")
    assert len(DATA) + BLOCK_BYTES // 2 <= proxy.bytes_served <= len(DATA) + BLOCK_BYTES // 2 + 100
    assert proxy.count("GET", NAME) == 4


def test_answers_of_a_wrong_length_harm_nothing(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    proxy.fault("truncate", times=2, method="GET", path=NAME)
    proxy.fault("longer", times=1, method="GET", path=NAME)
    Fetcher([bucket(storage)], STORE).fetch(FILE, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


def test_bytes_that_stay_wrong_are_corrupt_and_a_whole_copy_elsewhere_is_taken(
    proxy: FaultProxy, storage: Storage, tmp_path: Path
) -> None:
    proxy.fault("flip", times=100, method="GET", path=NAME)
    fetcher = Fetcher([bucket(storage)], STORE)
    error = failure(lambda: fetcher.fetch(FILE, tmp_path / "a"), within_s=20)
    assert isinstance(error, Corrupt)
    assert str(error) == (
        f"{STORE}/{NAME}: no place has the file whole: s3: the bytes differ from their digest, read 2 times\n"
        "  outgrow data verify shows what is damaged; a whole copy of it, put in its place, mends it"
    )
    assert fetcher.traffic.snapshot()["s3"].errors == {"corrupt": 2}
    assert not (tmp_path / "a").exists()

    hdd = Place(name="hdd", storage=Storage(str(tmp_path / "hdd")), tier=Tier(name="hdd", path=str(tmp_path / "hdd")))
    hdd.storage.write(f"{STORE}/{NAME}", DATA)
    assert Fetcher([bucket(storage), hdd], STORE).fetch(FILE, tmp_path / "a") == "hdd"
    assert (tmp_path / "a").read_bytes() == DATA


def test_what_is_not_there_or_not_allowed_is_not_asked_for_again(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    absent = ShardFile(name=f"{NAME}.zstd", num_bytes=1, sha256=FILE.sha256)
    error = failure(lambda: Fetcher([bucket(storage)], STORE).fetch(absent, tmp_path / "a"), within_s=5)
    assert isinstance(error, Corrupt)
    assert error.message == "no place has the file whole: s3: 404 NoSuchKey"
    assert proxy.count("GET", NAME) == 1

    proxy.clear()
    proxy.fault("status", times=100, status=403, code="AccessDenied")
    fetcher = Fetcher([bucket(storage)], STORE)
    error = failure(lambda: fetcher.fetch(FILE, tmp_path / "a"), within_s=5)
    assert isinstance(error, SiteError)
    assert error.message == "cannot be read: s3: 403 AccessDenied"
    assert "storage_options" in error.hint and "${env:NAME}" in error.hint
    assert fetcher.traffic.snapshot()["s3"].errors == {"denied": 1}
    assert proxy.count() == 1


def test_a_slow_drip_is_cut_and_the_rest_asked_for_anew(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_S", 0.5)
    proxy.fault("drip", times=2, method="GET", path=NAME)
    fetcher = Fetcher([bucket(storage)], STORE, give_up_s=30)
    start = time.monotonic()
    assert fetcher.fetch(FILE, tmp_path / "a") == "s3"
    assert time.monotonic() - start < 15
    assert (tmp_path / "a").read_bytes() == DATA
    assert fetcher.traffic.snapshot()["s3"].errors["timeout"] >= 2

    proxy.fault("drip", times=1000, method="GET", path=NAME)
    error = failure(lambda: Fetcher([bucket(storage)], STORE, give_up_s=2).fetch(FILE, tmp_path / "b"), within_s=10)
    assert isinstance(error, Unreachable)
    assert error.message.startswith("cannot be read, tried for ") and "s3: FSTimeoutError" in error.message


def test_a_line_that_is_slow_but_moves_is_enough(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 8 MB would time out for ever at this rate; smaller ones do not."""
    monkeypatch.setattr(blocks, "BLOCK_S", 1.0)
    proxy.throttle(6e6)
    start = time.monotonic()
    Fetcher([bucket(storage)], STORE, give_up_s=30).fetch(FILE, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    assert len(DATA) / 6e6 * 0.9 < time.monotonic() - start < 30


def test_a_bucket_that_is_away_for_a_while_is_waited_for(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    fetcher = Fetcher([bucket(storage)], STORE, give_up_s=60)
    with proxy.absent():
        fetching = threading.Thread(target=fetcher.fetch, args=(FILE, tmp_path / "a"))
        fetching.start()
        time.sleep(3)
        assert fetching.is_alive()
    fetching.join(60)
    assert (tmp_path / "a").read_bytes() == DATA
    assert fetcher.traffic.snapshot()["s3"].errors["unreachable"] >= 2

    with proxy.absent():
        error = failure(lambda: Fetcher([bucket(storage)], STORE, give_up_s=2).fetch(FILE, tmp_path / "b"), within_s=10)
    assert isinstance(error, Unreachable)
    assert error.message == "cannot be read, tried for 2 s: s3: EndpointConnectionError"


_FETCH = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fault_proxy import s3_storage
from outgrow.recipes.schema.tiers import Tier
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.shard_list import ShardFile
from outgrow.streaming.tiers.transfer import Fetcher
url, sha256, num_bytes, to = sys.argv[1:]
place = Place(name="s3", storage=s3_storage(url), tier=Tier(name="s3", path="s3://bucket"))
Fetcher([place], {store!r}).fetch(ShardFile(name={name!r}, num_bytes=int(num_bytes), sha256=sha256), Path(to))
"""


def test_a_fetch_that_was_killed_goes_on_where_it_was(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    proxy.throttle(8e6)
    code = _FETCH.format(tests=str(Path(__file__).parent.parent), store=STORE, name=NAME)
    words = [sys.executable, "-c", code, proxy.url, FILE.sha256, str(len(DATA)), str(tmp_path / "a")]
    process = subprocess.Popen(words)
    part = tmp_path / f"a{PART}"
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < BLOCK_BYTES:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists()
    there = part.stat().st_size
    proxy.throttle(None)
    time.sleep(0.2)  # what is on its way to the dead still counts as served
    proxy.clear()
    Fetcher([bucket(storage)], STORE).fetch(FILE, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    assert len(DATA) - there <= proxy.bytes_served <= len(DATA) - there + 100
    assert os.listdir(tmp_path) == ["a"]


# --- the storage of datasets and runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["status", "reset", "lost_answer", "truncate", "flip"])
def test_files_are_read_and_written_through_faults(proxy: FaultProxy, storage: Storage, kind: Any) -> None:
    for method in ("HEAD", "GET", "PUT", "DELETE"):
        proxy.fault(kind, times=1, method=method)
    storage.write("d/a", DATA[:100_000])
    assert storage.read("d/a") == DATA[:100_000]
    assert storage.read_range("d/a", 10, 20) == DATA[10:20]
    storage.remove("d")
    assert storage.names("d") == []


def test_a_lock_whose_answer_was_lost_is_still_ours(proxy: FaultProxy, storage: Storage) -> None:
    for number in range(3):
        proxy.fault("lost_answer", times=number, method="PUT")
        assert storage.create(f"lock-{number}", b"mine")
        assert not storage.create(f"lock-{number}", b"theirs")
        assert storage.read(f"lock-{number}") == b"mine"


def test_a_large_file_is_sent_in_parts_each_until_it_arrives(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", 6 << 20)
    data = DATA + b"end"
    (tmp_path / "local").write_bytes(data)
    proxy.fault("lost_answer", times=1, method="POST", path="uploads")
    proxy.fault("status", times=2, method="PUT", path="partNumber=2")
    proxy.fault("lost_answer", times=1, method="PUT", path="partNumber=1")
    proxy.fault("lost_answer", times=1, method="POST", path="uploadId")
    storage.upload(tmp_path / "local", "up/large")
    assert storage.sizes("up") == {"large": len(data)}
    assert b"".join(storage.blocks("up/large")) == data
    assert proxy.count("PUT", "partNumber", fault="") >= 5

    with pytest.raises(ZeroDivisionError), storage.open_write("up/half") as file:
        file.write(data)
        raise ZeroDivisionError
    assert storage.names("up") == ["large"]
    assert not [upload for upload in storage.fs.list_multipart_uploads("bucket") if upload["Key"].endswith("half")]


def test_a_folder_moves_and_goes_through_faults(proxy: FaultProxy, storage: Storage) -> None:
    for number in range(20):
        storage.write(f"old/{number}*", b"x")
    proxy.fault("status", times=5, method="PUT")
    proxy.fault("lost_answer", times=5, method="DELETE")
    storage.rename("old", "new")
    assert storage.names("old") == [] and len(storage.names("new")) == 20
    storage.remove("new/1*")  # a name, not a pattern
    assert len(storage.names("new")) == 19
    storage.remove("new")


def test_a_bucket_that_is_away_or_silent_ends_in_bounded_time(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = storage.with_patience(0.5)
    with proxy.absent():
        for action in (
            lambda: impatient.exists("a"),
            lambda: impatient.names("a"),
            lambda: impatient.read("a"),
            lambda: impatient.write("a", b""),
            lambda: impatient.create("a", b""),
            lambda: impatient.remove("a"),
        ):
            error = failure(action, within_s=6)
            assert isinstance(error, Unreachable)
            assert error.where == "s3://bucket/some/prefix"
            assert error.message.startswith("cannot ") and ": EndpointConnectionError, after " in error.message
    monkeypatch.setattr("outgrow.storage._ANSWER_S", (1.0, 1.0))
    proxy.fault("silent", times=10, seconds=5)
    error = failure(lambda: impatient.exists("a"), within_s=6)
    assert isinstance(error, Unreachable) and "Timeout" in error.message


def test_wrong_credentials_and_a_bucket_that_is_not_there_are_told_as_such(proxy: FaultProxy, storage: Storage) -> None:
    proxy.fault("status", times=1, status=403, code="InvalidAccessKeyId", method="PUT")
    error = failure(lambda: storage.write("a", b""), within_s=5)
    assert isinstance(error, SiteError)
    assert error.message == "cannot write a: access is denied (403 InvalidAccessKeyId)"
    none = Storage("s3://absent-bucket/x", s3_options(proxy.url))
    error = failure(lambda: none.write("a", b""), within_s=5)
    assert str(error) == "s3://absent-bucket/x: there is no such bucket\n  make it first, or give another"


def test_copies_are_verified_both_ways_through_faults(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    disk = Storage(str(tmp_path))
    proxy.fault("reset", times=2, method="GET", path=NAME)
    arguments: dict[str, Any] = {"limiter": None, "on_bytes": lambda _: None}
    assert copy_verified(storage, f"{STORE}/{NAME}", disk, "a", expected=None, **arguments) == FILE.sha256
    proxy.fault("status", times=2, method="PUT")
    assert copy_verified(disk, "a", storage, "copied/a", expected=FILE.sha256, **arguments) == FILE.sha256

    proxy.fault("flip", times=1, method="GET", path="copied/b")
    with pytest.raises(IntegrityError, match="copied/b: what was read back differs from what was written"):
        copy_verified(disk, "a", storage, "copied/b", expected=FILE.sha256, **arguments)
    assert storage.names("copied") == ["a"]
