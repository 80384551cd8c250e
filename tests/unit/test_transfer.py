"""Fetching shards and copying files between folders: whole or not at all, checked, resumed, within limits."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest
from full_disk import files_limited_to
from hypothesis import given
from hypothesis import strategies as st

from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.tiers import Tier
from outgrow.retry import Unreachable
from outgrow.storage import Storage
from outgrow.streaming.tiers import copy_and_check
from outgrow.streaming.tiers.partial import PART
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.rate import Debt, RateLimit
from outgrow.streaming.tiers.shard_list import ShardFile
from outgrow.streaming.tiers.traffic import Traffic
from outgrow.streaming.tiers.transfer import Corrupt, Fetcher, copy_verified

STORE = "datasets/ab12"
NAME = "streams/text/train/shard.00000.mds"
DATA = bytes(range(256)) * 36_000  # more than one block
FILE = ShardFile(name=NAME, num_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


def place(root: Path, name: str, data: bytes | None = DATA, **tier: str) -> Place:
    """A folder that holds the store with one shard."""
    path = root / name / STORE / NAME
    path.parent.mkdir(parents=True)
    if data is not None:
        path.write_bytes(data)
    return Place(name=name, storage=Storage(str(root / name)), tier=Tier(name=name, path=str(root / name), **tier))


def shard_of(place: Place) -> Path:
    return place.folder / STORE / NAME


def flipped(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def test_a_shard_comes_whole_from_the_first_that_has_it(tmp_path: Path) -> None:
    fetcher = Fetcher([place(tmp_path, "hdd"), place(tmp_path, "usb")], STORE)
    assert fetcher.fetch(FILE, tmp_path / "hot" / "a") == "hdd"
    assert (tmp_path / "hot" / "a").read_bytes() == DATA
    assert os.listdir(tmp_path / "hot") == ["a"]
    hdd = fetcher.traffic.snapshot()["hdd"]
    assert (hdd.shards, hdd.bytes, hdd.errors) == (1, len(DATA), {})
    assert hdd.read_s > 0


@pytest.mark.parametrize(
    ("wrong", "text", "reads"),
    [
        (flipped(DATA), "the bytes differ from their digest", 2),
        (DATA[:-1], f"it ends after {len(DATA) - 1:,} of {len(DATA):,} bytes", 2),
        (DATA + b"x", f"it is longer than {len(DATA):,} bytes", 2),
        (b"", f"it ends after 0 of {len(DATA):,} bytes", 2),
    ],
    ids=["flipped", "short", "long", "empty"],
)
def test_a_wrong_file_is_read_twice_then_the_next_place_is_asked(tmp_path: Path, wrong: bytes, text: str, reads: int) -> None:
    bad, good = place(tmp_path, "hdd", wrong), place(tmp_path, "usb")
    fetcher = Fetcher([bad, good], STORE)
    assert fetcher.fetch(FILE, tmp_path / "a") == "usb"
    assert (tmp_path / "a").read_bytes() == DATA
    assert fetcher.traffic.snapshot()["hdd"].errors == {"corrupt": reads}
    assert fetcher.traffic.snapshot()["hdd"].shards == 0

    with pytest.raises(Corrupt) as caught:
        Fetcher([bad, place(tmp_path, "nfs", None)], STORE).fetch(FILE, tmp_path / "b")
    assert str(caught.value) == (
        f"{STORE}/{NAME}: no place has the file whole: hdd: {text}, read 2 times; nfs: No such file or directory\n"
        "  outgrow data verify shows what is damaged; a whole copy of it, put in its place, mends it"
    )
    assert sorted(os.listdir(tmp_path)) == ["a", "hdd", "nfs", "usb"]
    assert shard_of(bad).read_bytes() == wrong


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0b", "a\\..\\b", ""])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    file = ShardFile(name=name, num_bytes=1, sha256="0")
    with pytest.raises(DataError, match="allowed: a path below the store"):
        Fetcher([place(tmp_path, "hdd")], STORE).fetch(file, tmp_path / "a")
    assert os.listdir(tmp_path) == ["hdd"]


def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    linked = place(tmp_path, "linked", None)
    shard_of(linked).symlink_to(tmp_path / "secret")
    piped = place(tmp_path, "piped", None)
    os.mkfifo(shard_of(piped))
    folder = place(tmp_path, "folder")
    shard_of(folder).parent.rename(tmp_path / "elsewhere")
    shard_of(folder).parent.symlink_to(tmp_path / "elsewhere")
    for holder in (linked, piped, folder):
        with pytest.raises(Corrupt, match="it is a link, or no regular file"):
            Fetcher([holder], STORE).fetch(FILE, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_disk_that_is_gone_is_waited_for_not_called_corrupt(tmp_path: Path) -> None:
    holder = place(tmp_path, "usb")
    (tmp_path / "usb" / "datasets").rename(tmp_path / "unplugged")
    start = time.monotonic()
    with pytest.raises(Unreachable, match="tried for 1 s: usb: there is no .*/usb/datasets/ab12 any more"):
        Fetcher([holder], STORE, give_up_s=1).fetch(FILE, tmp_path / "a")
    assert time.monotonic() - start < 3

    back = threading.Timer(0.5, (tmp_path / "unplugged").rename, [tmp_path / "usb" / "datasets"])
    back.start()
    fetcher = Fetcher([holder], STORE, give_up_s=30)
    assert fetcher.fetch(FILE, tmp_path / "a") == "usb"
    assert fetcher.traffic.snapshot()["usb"].errors["unreachable"] >= 1


def test_what_lies_there_in_part_is_taken_up_and_checked(tmp_path: Path) -> None:
    fetcher = Fetcher([place(tmp_path, "hdd")], STORE)
    part = tmp_path / f"a{PART}"
    part.write_bytes(DATA[:5_000_000])
    assert fetcher.fetch(FILE, tmp_path / "a") == "hdd"
    assert fetcher.traffic.snapshot()["hdd"].bytes == len(DATA) - 5_000_000

    for left in (flipped(DATA)[:5_000_000], flipped(DATA), DATA + b"more"):
        part.write_bytes(left)
        assert fetcher.fetch(FILE, tmp_path / "a") == "hdd"
        assert (tmp_path / "a").read_bytes() == DATA
    assert fetcher.traffic.snapshot()["hdd"].errors == {}, "the place has done nothing wrong"

    part.write_bytes(DATA)
    assert Fetcher([], STORE).fetch(FILE, tmp_path / "a") == ""


def test_a_full_disk_is_told_as_such_and_leaves_no_half_file(tmp_path: Path) -> None:
    fetcher = Fetcher([place(tmp_path, "hdd")], STORE)
    with files_limited_to(5_000_000), pytest.raises(OSError, match="File too large"):
        fetcher.fetch(FILE, tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [f"a{PART}", "hdd"]
    assert fetcher.traffic.snapshot()["hdd"].errors == {}
    assert fetcher.fetch(FILE, tmp_path / "a") == "hdd"
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_shard_goes_into_memory_too(tmp_path: Path) -> None:
    fd = os.memfd_create("shard")
    assert Fetcher([place(tmp_path, "hdd")], STORE).fetch_into(FILE, fd) == "hdd"
    assert Path(f"/proc/self/fd/{fd}").read_bytes() == DATA
    os.close(fd)


def test_a_place_with_a_limit_is_read_no_faster_by_all_threads_together(tmp_path: Path) -> None:
    fetcher = Fetcher([place(tmp_path, "hdd", limit="50 MB/s")], STORE)
    start = time.monotonic()
    threads = [threading.Thread(target=fetcher.fetch, args=(FILE, tmp_path / str(number))) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # What is taken last is paid for by nobody.
    assert time.monotonic() - start >= (3 * len(DATA) - (8 << 20)) / 50e6
    assert fetcher.traffic.snapshot()["hdd"].read_s < 0.5, "waiting for the limit is not reading"


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 2)), max_size=30))
def test_no_more_passes_than_the_rate_allows(steps: list[tuple[int, float]]) -> None:
    """Twin: over any stretch of takes, bytes but the last's take at least their time."""
    debt, now, passed = Debt(1e6), 0.0, []
    for num_bytes, pause_s in steps:
        now += pause_s
        now += debt.take(num_bytes, now)
        passed.append((now, num_bytes))
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            between = sum(num_bytes for _, num_bytes in passed[first:last])
            assert passed[last][0] - passed[first][0] >= between / 1e6 - 1e-6


def test_time_of_reads_at_once_counts_once() -> None:
    traffic = Traffic()
    start = time.monotonic()
    with traffic.reading("hdd"), traffic.reading("hdd"), traffic.reading("usb"):
        time.sleep(0.05)
    took_s = time.monotonic() - start
    then = traffic.snapshot()
    assert 0.05 <= then["usb"].read_s <= then["hdd"].read_s <= took_s
    assert Traffic(then).snapshot() == then


@pytest.fixture(params=["folder", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "target") if request.param == "folder" else f"memory://{uuid4()}")


@pytest.mark.parametrize("origin", ["folder", "bucket"])
@pytest.mark.parametrize("num_bytes", [0, 1, 8 << 20, len(DATA)])
def test_a_copy_is_read_back(tmp_path: Path, target: Storage, origin: str, num_bytes: int) -> None:
    source = Storage(str(tmp_path / "source") if origin == "folder" else f"memory://{uuid4()}")
    source.write("a", DATA[:num_bytes])
    told: list[int] = []
    sha256 = hashlib.sha256(DATA[:num_bytes]).hexdigest()
    for expected in (None, sha256):
        copied = copy_verified(source, "a", target, "d/b", expected=expected, limiter=None, on_bytes=told.append)
        assert copied == sha256
    assert target.read("d/b") == DATA[:num_bytes] and target.names("d") == ["b"]
    assert sum(told) == 2 * num_bytes


def test_a_copy_of_wrong_bytes_is_refused_and_leaves_nothing(tmp_path: Path, target: Storage) -> None:
    source = Storage(str(tmp_path / "source"))
    source.write("a", flipped(DATA))
    with pytest.raises(IntegrityError, match="source/a: the bytes differ from their digest"):
        copy_verified(source, "a", target, "b", expected=FILE.sha256, limiter=None, on_bytes=lambda _: None)
    assert target.names("") == [] and source.read("a") == flipped(DATA)


@pytest.mark.parametrize("expected", [None, FILE.sha256])
def test_what_the_disk_changed_is_found_on_reading_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: str | None
) -> None:
    monkeypatch.setattr(copy_and_check, "PIECE_BYTES", 4 << 20)
    source, target = Storage(str(tmp_path / "source")), Storage(str(tmp_path / "target"))
    source.write("a", DATA)
    written = 0

    def flip_what_is_written(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if written == len(DATA):
            with open(tmp_path / "target" / f"b{PART}", "r+b") as file:
                file.seek(len(DATA) - 1000)
                file.write(b"!")

    with pytest.raises(IntegrityError, match="target/b: what was read back differs from what was written"):
        copy_verified(source, "a", target, "b", expected=expected, limiter=None, on_bytes=flip_what_is_written)
    assert target.names("") == []


@pytest.mark.parametrize("expected", [None, FILE.sha256])
def test_a_copy_goes_on_where_it_stopped(tmp_path: Path, expected: str | None) -> None:
    source, target = Storage(str(tmp_path / "source")), Storage(str(tmp_path / "target"))
    source.write("a", DATA)

    def copy() -> int:
        told: list[int] = []
        copied = copy_verified(source, "a", target, "b", expected=expected, limiter=None, on_bytes=told.append)
        assert copied == FILE.sha256 and target.read("b") == DATA
        return sum(told)

    with files_limited_to(5_000_000), pytest.raises(OSError, match="File too large"):
        copy()
    assert target.names("") == [f"b{PART}"]
    assert copy() == len(DATA) - 5_000_000
    for left in (flipped(DATA)[:5_000_000], DATA + b"x", flipped(DATA)):
        (tmp_path / "target" / f"b{PART}").write_bytes(left)
        copy()


def test_a_copy_keeps_to_its_limit(tmp_path: Path) -> None:
    source, target = Storage(str(tmp_path / "source")), Storage(str(tmp_path / "target"))
    source.write("a", DATA)
    start = time.monotonic()
    copy_verified(source, "a", target, "b", expected=None, limiter=RateLimit(40e6), on_bytes=lambda _: None)
    assert time.monotonic() - start >= (len(DATA) - (8 << 20)) / 40e6
