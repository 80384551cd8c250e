"""Agents find one another through the storage; what lies there was written by others, and is proven before it is passed on."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outgrow.monitoring.agent import discovery
from outgrow.monitoring.agent.discovery import (
    FOLDER,
    Directory,
    Freshness,
    Node,
    Registration,
    is_address,
    ray_targets,
    read_nodes,
)
from outgrow.storage import Storage

NOW = time.time()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def put(storage: Storage, name: str, value: Any) -> None:
    storage.write(f"{FOLDER}/{name}", value if isinstance(value, bytes) else json.dumps(value).encode())


def record(host: str, url: str = "", when: float | None = None) -> dict[str, Any]:
    return {"host": host, "url": url or f"http://{host}:9640", "time": time.time() if when is None else when}


def directory(storage: Storage, host: str = "here", url: str = "http://127.0.0.1:9640") -> Directory:
    return Directory(storage, host, url, cache_s=0.0)


def nodes_of(groups: list[dict[str, Any]]) -> list[str]:
    return [group["labels"]["node"] for group in groups]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what is passed on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["a:1", "node-1.lan:9640", "my_host:65535", "10.0.0.1:9640", "[::1]:80", "[2001:db8::a:1]:9640", "[::ffff:10.0.0.1]:1"],
)
def test_addresses(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        ":9640",
        "a:",
        "a:0",
        "a:65536",
        "a:123456",
        "a:1/path",
        "a:1?x",
        "u:p@a:1",
        "a b:1",
        "a:1\n",
        "a\n:1",
        "-a:1",
        ".a:1",
        "a;b:1",
        "a}:1",
        'a":1',
        "::1:80",
        "[zz::1]:80",
        "[::1:80",
        "[1.2.3.4.5]:80",
        "a:٣",
        "ä:1",
        "x" * 300 + ":1",
    ],
)
def test_what_is_no_address(text: str) -> None:
    assert not is_address(text)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "http://a:1",
        {},
        {"host": "a", "url": "http://a:1"},
        {"host": "a", "url": "http://a:1", "time": "now"},
        {"host": "a", "url": "http://a:1", "time": math.nan},
        {"host": "a", "url": "http://a:1", "time": math.inf},
        {"host": "a", "url": "http://a:1/metrics", "time": NOW},
        {"host": "a", "url": "http://user:secret@a:1", "time": NOW},
        {"host": "a", "url": "ftp://a:1", "time": NOW},
        {"host": "a", "url": "a:1", "time": NOW},
        {"host": 'a", __address__="evil:1', "url": "http://a:1", "time": NOW},
        {"host": "../a", "url": "http://a:1", "time": NOW},
        {"host": "", "url": "http://a:1", "time": NOW},
        {"host": ["a"], "url": "http://a:1", "time": NOW},
    ],
)
def test_what_is_no_record(value: object) -> None:
    assert Node.read(value) is None


@pytest.mark.parametrize(
    ("address", "far"),
    [
        ("10.0.0.1:1", True),
        ("node.lan:1", True),
        ("[2001:db8::1]:1", True),
        ("127.0.0.1:1", False),
        ("127.9.9.9:1", False),
        ("localhost:1", False),
        ("[::1]:1", False),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
    ],
)
def test_addresses_that_other_nodes_reach(address: str, far: bool) -> None:
    assert Node(host="a", scheme="http", address=address, time=0.0).is_far is far


# --- records in the storage -------------------------------------------------------------------------------------------


def test_the_answer_to_prometheus(storage: Storage) -> None:
    put(storage, "b.json", record("b", "https://b.lan:9640"))
    put(storage, "a.json", record("a", "http://10.0.0.7:9641"))
    put(storage, "here.json", record("here", "http://10.0.0.1:1"))
    assert directory(storage).targets() == [
        {"targets": ["127.0.0.1:9640"], "labels": {"node": "here"}},
        {"targets": ["10.0.0.7:9641"], "labels": {"node": "a"}},
        {"targets": ["b.lan:9640"], "labels": {"node": "b", "__scheme__": "https"}},
    ]


def test_records_that_are_none_are_passed_over(storage: Storage, tmp_path: Path) -> None:
    put(storage, "good.json", record("good"))
    put(storage, "other.json", record("victim", "http://evil:1"))
    put(storage, "half.json", b'{"host": "half", "u')
    put(storage, "bytes.json", b"\xff\xfe\x00")
    put(storage, "deep.json", b"[" * 4000)
    put(storage, "long.json", {**record("long"), "more": "x" * 5000})
    put(storage, "text.txt", record("text"))
    put(storage, "a b.json", record("a b"))
    put(storage, ".hidden.json", record(".hidden"))
    folder = Path(storage.path(FOLDER))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    (folder / "device.json").symlink_to("/dev/zero")
    assert [node.host for node in read_nodes(storage)] == ["good"]


def test_no_more_nodes_than_there_may_be(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "MAX_NODES", 3)
    for number in range(6):
        put(storage, f"n{number}.json", record(f"n{number}"))
    assert [node.host for node in read_nodes(storage)] == ["n0", "n1", "n2"]


def test_an_empty_storage_shows_this_node(storage: Storage) -> None:
    assert nodes_of(directory(storage).targets()) == ["here"]


def test_loopback_of_another_node_is_left_out_and_said_once(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    put(storage, "near.json", record("near", "http://127.0.0.1:9640"))
    nodes = directory(storage)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert nodes_of(nodes.targets()) == ["here"]
    assert [message for message in caplog.messages if "monitoring.address" in message] == [
        "the agent of near listens on 127.0.0.1:9640, where other nodes cannot reach it; "
        "set monitoring.address in its site.yaml"
    ]


def test_old_records_are_left_out(storage: Storage) -> None:
    put(storage, "fresh.json", record("fresh", when=time.time() - 60))
    put(storage, "old.json", record("old", when=time.time() - 300))
    put(storage, "future.json", record("future", when=time.time() + 1e9))
    assert nodes_of(directory(storage).targets()) == ["here", "fresh"]


def node(host: str, when: float) -> Node:
    return Node(host=host, scheme="http", address=f"{host}:1", time=when)


def test_a_node_whose_clock_is_wrong_is_fresh_while_it_writes() -> None:
    fresh = Freshness(120)
    for skew in (-7200.0, 7200.0):
        host = f"skewed{skew}"
        found = []
        for second in range(0, 600, 30):
            # It writes every 30 s until second 300, by its own clock.
            when = NOW + skew + min(second, 300)
            found.append(bool(fresh.of([node(host, when)], now=NOW + second, clock=1000.0 + second)))
        assert found[0] is False, "nothing tells it from an old one yet"
        assert all(found[1:15]), "it has changed within 120 s"
        assert not any(found[15:])


def test_our_own_clock_may_jump() -> None:
    fresh = Freshness(120)
    found = []
    for second in range(0, 300, 30):
        now = NOW + second + (3600 if second >= 150 else 0)
        found.append(bool(fresh.of([node("a", NOW + second)], now=now, clock=float(second))))
    assert all(found)


class Broken(Storage):
    """A storage that can be made to fail or to hang."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.fails = threading.Event()
        self.hangs = threading.Event()
        self.wake = threading.Event()
        self.asked: list[str] = []

    def _meet(self, what: str) -> None:
        self.asked.append(what)
        if self.hangs.is_set():
            self.wake.wait()
        if self.fails.is_set():
            raise OSError("no such luck")

    def sizes(self, key: str) -> dict[str, int]:
        self._meet("sizes")
        return super().sizes(key)

    def write(self, key: str, data: bytes) -> None:
        self._meet("write")
        super().write(key, data)

    def remove(self, key: str) -> None:
        self._meet("remove")
        super().remove(key)


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Broken]:
    storage = Broken(str(tmp_path / "broken"))
    yield storage
    storage.hangs.clear()
    storage.wake.set()


def test_nodes_stay_while_the_storage_does_not_answer(broken: Broken, caplog: pytest.LogCaptureFixture) -> None:
    put(broken, "far.json", record("far"))
    nodes = directory(broken)
    assert nodes_of(nodes.targets()) == ["here", "far"]
    broken.fails.set()
    for _ in range(3):
        assert nodes_of(nodes.targets()) == ["here", "far"]
    assert len([message for message in caplog.messages if "no such luck" in message]) == 1
    broken.fails.clear()
    broken.hangs.set()
    begun = time.monotonic()
    for _ in range(3):
        assert nodes_of(nodes.targets(wait_s=0.05)) == ["here", "far"]
    assert time.monotonic() - begun < 1.0
    broken.hangs.clear()
    broken.wake.set()
    broken.remove(f"{FOLDER}/far.json")
    until(lambda: nodes_of(nodes.targets()) == ["here"])


def test_a_storage_that_never_answers_shows_this_node_at_once(broken: Broken) -> None:
    broken.hangs.set()
    begun = time.monotonic()
    assert nodes_of(directory(broken).targets(wait_s=0.05)) == ["here"]
    assert time.monotonic() - begun < 1.0


def test_the_storage_is_asked_once_in_a_while(broken: Broken) -> None:
    nodes = Directory(broken, "here", "http://127.0.0.1:9640", cache_s=60)
    for _ in range(5):
        nodes.targets()
    assert broken.asked == ["sizes"]


# --- registration -----------------------------------------------------------------------------------------------------


def test_a_node_comes_writes_again_and_goes(storage: Storage) -> None:
    nodes = directory(storage)
    registration = Registration(storage, "far", "http://far.lan:9640", interval_s=0.02)
    registration.start()
    until(lambda: nodes_of(nodes.targets()) == ["here", "far"])
    first = storage.read_json(f"{FOLDER}/far.json")
    assert first.keys() == {"host", "url", "time"}
    until(lambda: storage.read_json(f"{FOLDER}/far.json")["time"] > first["time"])
    registration.withdraw()
    assert storage.names(FOLDER) == []
    assert nodes_of(nodes.targets()) == ["here"]


def test_withdrawn_before_it_was_started(storage: Storage) -> None:
    Registration(storage, "far", "http://far.lan:9640").withdraw()
    assert storage.names(FOLDER) == []


def test_a_dead_storage_holds_nobody_up_and_is_tried_again(broken: Broken, caplog: pytest.LogCaptureFixture) -> None:
    broken.fails.set()
    registration = Registration(broken, "far", "http://far.lan:9640", interval_s=0.01)
    registration.start()
    until(lambda: broken.asked.count("write") > 3)
    assert len([message for message in caplog.messages if "no such luck" in message]) == 1
    broken.fails.clear()
    until(lambda: broken.names(FOLDER) == ["far.json"])
    broken.hangs.set()
    time.sleep(0.05)
    begun = time.monotonic()
    registration.withdraw(timeout_s=0.1)
    assert time.monotonic() - begun < 1.0


def test_a_name_that_nobody_would_take_is_said(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    registration = Registration(storage, "no name", "http://far.lan:9640")
    registration.start()
    registration.withdraw()
    assert storage.names(FOLDER) == []
    assert "other nodes cannot find this agent" in caplog.text


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_targets_of_ray(tmp_path: Path) -> None:
    (tmp_path / "session.json").write_text(
        json.dumps(
            [
                {"labels": {"job": "ray"}, "targets": ["10.0.0.2:64747", "10.0.0.2:1/path", "evil", 7, "[::1]:5"]},
                {"labels": {"job": "ray", "__metrics_path__": "/x", "n": 5, "v": 'a"b', "bad-name": "x"}, "targets": ["a:1"]},
                {"targets": ["b:2"]},
                {"targets": ["nothing"]},
                {"targets": "a:1"},
                "text",
            ]
        )
    )
    # Ray leaves a link where its file used to be.
    (tmp_path / "link.json").symlink_to("session.json")
    assert ray_targets(str(tmp_path / "link.json")) == [
        {"targets": ["10.0.0.2:64747", "[::1]:5"], "labels": {"job": "ray"}},
        {"targets": ["a:1"], "labels": {"job": "ray"}},
        {"targets": ["b:2"], "labels": {}},
    ]


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "[" * 100_000, "\0"])
def test_a_file_that_is_not_rays(tmp_path: Path, text: str) -> None:
    (tmp_path / "ray.json").write_text(text)
    assert ray_targets(str(tmp_path / "ray.json")) == []


def test_no_file_a_pipe_a_folder_and_a_file_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert ray_targets(str(tmp_path / "absent")) == []
    assert ray_targets(str(tmp_path / "pipe")) == []
    assert ray_targets(str(tmp_path)) == []
    file = tmp_path / "ray.json"
    file.write_text(json.dumps([{"targets": ["a:1"]}]))
    if os.getuid() == 0:
        os.chown(file, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert ray_targets(str(file)) == []
