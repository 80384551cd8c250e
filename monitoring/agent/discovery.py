"""Where the agents of all nodes are: each writes a small record under the site's storage, and reads those of the others.

``targets`` is the answer to Prometheus's HTTP service discovery. What lies in the storage was written by other machines:
names, sizes, URLs and the characters in them are checked before any of it is passed on.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from outgrow.monitoring.agent.background import Background
from outgrow.storage import Storage

log = logging.getLogger(__name__)

TargetGroup: TypeAlias = dict[str, Any]
"""``{"targets": ["host:port"], "labels": {...}}``, as Prometheus takes it."""

FOLDER = "monitoring/nodes"
INTERVAL_S = 30.0
MAX_AGE_S = 120.0
CACHE_S = 10.0
PATIENCE_S = 10.0
WAIT_S = 0.5
"""How long an answer waits for the storage; then it is the answer of before. Prometheus waits no longer than it waits to ask
again."""
MAX_NODES = 1000
MAX_BYTES = 4096
MAX_RAY_BYTES = 1 << 20

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?"
_HOST_NAME = re.compile(_HOST, re.ASCII)
_ADDRESS = re.compile(rf"({_HOST}|\[[0-9A-Fa-f:.]{{2,45}}\]):([0-9]{{1,5}})", re.ASCII)
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)
_VALUE = re.compile(r"[A-Za-z0-9_.:/-]{0,128}", re.ASCII)


# --- what may be passed on --------------------------------------------------------------------------------------------


def is_address(text: str) -> bool:
    """Whether ``text`` is ``host:port``, ``a.b.c.d:port`` or ``[v6]:port`` and nothing besides."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and 1 <= int(found[2]) <= 65535 and (text[0] != "[" or _ip(found[1]) is not None)


@dataclass(frozen=True, kw_only=True)
class Node:
    """An agent: its node's name, where it listens, and when it last said so (Unix seconds, of its own clock)."""

    host: str
    scheme: str
    address: str
    time: float

    @classmethod
    def read(cls, data: object) -> Node | None:
        """None where ``data`` is not what ``Registration`` writes."""
        if not isinstance(data, dict):
            return None
        host, url, when = data.get("host"), data.get("url"), data.get("time")
        if not (isinstance(host, str) and isinstance(url, str) and isinstance(when, (int, float))):
            return None
        scheme, found, address = url.partition("://")
        if scheme not in ("http", "https") or not found or not is_address(address) or not _HOST_NAME.fullmatch(host):
            return None
        if not math.isfinite(when):
            return None  # not a number differs from itself, and would be new at every look
        return cls(host=host, scheme=scheme, address=address, time=float(when))

    @property
    def is_far(self) -> bool:
        """Whether other nodes can reach the address: it is neither loopback nor one that stands for all addresses."""
        name = self.address.rpartition(":")[0]
        ip = _ip(name)
        return not (name.lower() == "localhost" if ip is None else ip.is_loopback or ip.is_unspecified)

    def group(self) -> TargetGroup:
        labels = {"node": self.host}
        return {"targets": [self.address], "labels": labels | ({"__scheme__": "https"} if self.scheme == "https" else {})}


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


# --- this node --------------------------------------------------------------------------------------------------------


class Registration:
    """Tells the other nodes where this one's agent listens, from a thread: a slow or dead bucket holds nobody up.

    ``url`` is one that they can connect to: they leave out loopback, and addresses that stand for all of a node.
    """

    def __init__(self, storage: Storage, host: str, url: str, *, interval_s: float = INTERVAL_S) -> None:
        self._storage, self._interval_s = storage.with_patience(PATIENCE_S), interval_s
        self._key = f"{FOLDER}/{host}.json"
        self._record = {"host": host, "url": url}
        self._ended = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)

    def start(self) -> None:
        if Node.read({**self._record, "time": 0.0}) is None:
            log.warning(
                "other nodes cannot find this agent: %r at %r is not a name and URL that they take", *self._record.values()
            )
        else:
            self._thread.start()

    def withdraw(self, timeout_s: float = 5.0) -> None:
        """Take the record away; gives up after ``timeout_s`` where the storage does not answer, and it grows stale then."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._write()
            self._ended.wait(self._interval_s)
        # By the same thread, so that no write comes after it.
        self._attempt(lambda: self._storage.remove(self._key))

    def _write(self) -> None:
        data = json.dumps({**self._record, "time": time.time()}).encode()
        self._attempt(lambda: self._storage.write(self._key, data))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
            self._failing = False
        except Exception as error:  # whatever a store's client raises: it is tried again
            if not self._failing:
                log.warning("other nodes cannot find this agent until %s can be written: %s", self._key, error)
            self._failing = True


# --- all nodes --------------------------------------------------------------------------------------------------------


class Directory:
    """The agents of all nodes as this node knows them; its own is always among them, whatever the storage says."""

    def __init__(
        self, storage: Storage, host: str, url: str, *, max_age_s: float = MAX_AGE_S, cache_s: float = CACHE_S
    ) -> None:
        self._storage, self._host, self._max_age_s = storage.with_patience(PATIENCE_S), host, max_age_s
        own = Node.read({"host": host, "url": url, "time": 0.0})
        if own is None:
            raise ValueError(f"not an agent's URL: {url}")
        self._own = own
        self._freshness = Freshness(max_age_s)
        self._told: set[str] = set()
        self._nodes = Background(self._read, name="nodes", every_s=cache_s)

    def targets(self, wait_s: float = WAIT_S) -> list[TargetGroup]:
        """The answer to Prometheus: this node first, then those whose agents have registered lately, by name.

        While the storage does not answer, those of before stay: an agent need not be gone because a bucket is.
        """
        try:
            reading = self._nodes.get(wait_s)
        except Exception as error:  # whatever a store's client raises
            self._say_once("storage", "agents of other nodes cannot be looked for: %s", error)
            reading = self._nodes.latest
        others = () if reading is None else reading.value
        return [self._own.group(), *(node.group() for node in others)]

    def _read(self) -> tuple[Node, ...]:
        found = [node for node in read_nodes(self._storage) if node.host != self._host]
        fresh = self._freshness.of(found, now=time.time(), clock=time.monotonic())
        self._told.discard("storage")
        for node in fresh:
            if not node.is_far:
                self._say_once(
                    node.host,
                    "the agent of %s listens on %s, where other nodes cannot reach it; set monitoring.address in its site.yaml",
                    node.host,
                    node.address,
                )
        return tuple(sorted((node for node in fresh if node.is_far), key=lambda node: node.host))

    def _say_once(self, about: str, text: str, *arguments: object) -> None:
        if about not in self._told:
            self._told.add(about)
            log.warning(text, *arguments)


class Freshness:
    """Which nodes have registered lately, though their clocks may be wrong.

    A record is fresh where its time is near ours, or where it has changed under our eyes within ``max_age_s``.
    """

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._seen: dict[str, tuple[float, float | None]] = {}

    def of(self, nodes: Iterable[Node], *, now: float, clock: float) -> list[Node]:
        """``now`` in Unix seconds, ``clock`` in seconds of the monotonic clock."""
        seen: dict[str, tuple[float, float | None]] = {}
        fresh = []
        for node in nodes:
            time_before, changed = self._seen.get(node.host, (node.time, None))
            if node.time != time_before:
                changed = clock
            seen[node.host] = (node.time, changed)
            if abs(now - node.time) <= self._max_age_s or (changed is not None and clock - changed <= self._max_age_s):
                fresh.append(node)
        self._seen = seen
        return fresh


def read_nodes(storage: Storage) -> list[Node]:
    """Every node that has a record, fresh or not; what is no such record is passed over."""
    wanted = []
    for name, num_bytes in storage.sizes(FOLDER).items():
        host = name.removesuffix(".json")
        if name.endswith(".json") and _HOST_NAME.fullmatch(host) and num_bytes <= MAX_BYTES:
            wanted.append(host)
    if len(wanted) > MAX_NODES:
        log.warning("%d agents have records in %s; the first %d are used", len(wanted), FOLDER, MAX_NODES)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda host: _read_node(storage, host), sorted(wanted)[:MAX_NODES]))
    return [node for node in found if node is not None]


def _read_node(storage: Storage, host: str) -> Node | None:
    try:
        node = Node.read(json.loads(storage.read_range(f"{FOLDER}/{host}.json", 0, MAX_BYTES)))
    except (FileNotFoundError, ValueError, RecursionError):  # taken away meanwhile, or not JSON
        return None
    # A record speaks for the node that its name is of, and for no other.
    return node if node is not None and node.host == host else None


# --- Ray --------------------------------------------------------------------------------------------------------------


def ray_targets(path: str) -> list[TargetGroup]:
    """Ray's own metrics targets, from the file that it lists them in; empty where there is none.

    The file lies in a folder that every user may write: only one of this user or of root is read, and only what is a
    ``host:port`` or a plain label in it is passed on.
    """
    try:
        data = json.loads(_read_own(path))
    except (OSError, ValueError, RecursionError):
        return []
    return list(_ray_groups(data))


def _ray_groups(data: object) -> Iterator[TargetGroup]:
    for group in data if isinstance(data, list) else []:
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            continue
        addresses = [one for one in group["targets"] if isinstance(one, str) and is_address(one)]
        if addresses:
            yield {"targets": addresses, "labels": _plain_labels(group.get("labels"))}


def _plain_labels(labels: object) -> dict[str, str]:
    """Those labels that say something about the target; names with ``__`` would tell Prometheus what to do."""
    found: Mapping[Any, Any] = labels if isinstance(labels, dict) else {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and _LABEL.fullmatch(name) and isinstance(value, str) and _VALUE.fullmatch(value)
    }


def _read_own(path: str) -> bytes:
    """Content of a small plain file of this user or root. Raises ``OSError``."""
    # O_NONBLOCK: a pipe in its place must not hold anybody up.
    with open(os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid not in (0, os.getuid()):
            raise PermissionError(f"{path} is not a plain file of this user")
        return file.read(MAX_RAY_BYTES)
