"""Asks the node agents of a site what their ranks do: this node's by its ``agent.json``, others' by their registration."""

from __future__ import annotations

import json
import math
import time
import urllib.error
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from outgrow.contracts import JsonDict
from outgrow.errors import SiteError
from outgrow.monitoring.agent.discovery import MAX_AGE_S, Freshness, read_nodes
from outgrow.monitoring.agent.start import find_agent
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.recording.slots import SLOTS
from outgrow.monitoring.stack.access import Client, client
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage

TIMEOUT_S = 2.0
NODES_EVERY_S = 15.0
"""How often the storage is asked for other nodes."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank as its agent tells: NaN in ``record`` where nothing is known."""

    rank: int
    host: str
    alive: bool
    record: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one agent tells of one run."""

    facts: JsonDict
    state: str
    ranks: tuple[Rank, ...]

    @property
    def started(self) -> float:
        value = self.facts.get("started")
        return float(value) if isinstance(value, int | float) else 0.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the agents have told of a run, and in words what did not answer."""

    told: tuple[Told, ...] = ()
    silent: tuple[str, ...] = ()


class Agents:
    """Asks all agents at once; one that is gone costs ``TIMEOUT_S``, and the others are heard."""

    def __init__(self, site: Site, storage: Storage) -> None:
        self._site = site
        self._storage = storage.with_patience(TIMEOUT_S)
        self._fresh = Freshness(MAX_AGE_S)
        self._own = ""
        self._others: dict[str, str] = {}
        self._listed = -math.inf

    def ask(self, run: str) -> Answers:
        """What is told of the run of that label now."""
        urls = self._urls()
        if not urls:
            return Answers(silent=("no node agent",))
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(self._ask_one, urls.values()))
        told = [own for answer in found if not isinstance(answer, str) for own in answer if own.facts.get("run") == run]
        silent = [f"{host}: {answer}" for host, answer in zip(urls, found, strict=True) if isinstance(answer, str)]
        return Answers(told=_of_newest_start(told), silent=tuple(silent))

    def _urls(self) -> dict[str, str]:
        """Where agents are, by host; this node's own first."""
        node = node_folder(self._site)
        own = find_agent(node)
        if time.monotonic() - self._listed >= NODES_EVERY_S:
            self._listed = time.monotonic()
            try:
                nodes = self._fresh.of(read_nodes(self._storage), now=time.time(), clock=time.monotonic())
                self._others = {one.host: f"{one.scheme}://{one.address}" for one in nodes if one.is_far}
            except Exception:  # whatever a store's client raises: those that were known stay
                pass
        self._own = own.url if own else ""
        here = {node.name: own.url} if own else {}
        return here | {host: url for host, url in self._others.items() if host != node.name}

    def _ask_one(self, url: str) -> list[Told] | str:
        """The runs of an agent, or why it did not answer."""
        try:
            return read_runs(json.loads(self._client(url).get(f"{url}/runs")))
        except urllib.error.HTTPError as error:
            return "it asks for a password (monitoring.access)" if error.code == 401 else f"HTTP {error.code}"
        except SiteError as error:
            return str(error).partition("\n")[0]
        except (OSError, ValueError, RecursionError) as error:
            return f"no answer ({type(error).__name__})"

    def _client(self, url: str) -> Client:
        """Where others are is read from the storage: the password goes only where the site's own certificate shows who asks
        for it, and to this node's agent. Raises ``SiteError``."""
        access = self._site.monitoring.access
        pinned = access.certificate if url.startswith("https:") else ""
        if pinned or url == self._own:
            return replace(client(access), certificate=pinned, timeout_s=TIMEOUT_S)
        return Client(timeout_s=TIMEOUT_S)


def read_runs(data: Any) -> list[Told]:
    """The runs of an answer; what is no such thing is passed over."""
    found = []
    for one in data if isinstance(data, list) else []:
        if isinstance(one, dict) and isinstance(one.get("facts"), dict) and isinstance(one.get("ranks"), dict):
            host = str(one["facts"].get("host", ""))
            ranks = (_rank(host, name, rank) for name, rank in one["ranks"].items())
            kept = tuple(rank for rank in ranks if rank is not None)
            found.append(Told(facts=one["facts"], state=str(one.get("state", "")), ranks=kept))
    return found


def _rank(host: str, name: str, data: Any) -> Rank | None:
    if not (name.isdecimal() and isinstance(data, dict) and isinstance(data.get("record"), dict)):
        return None
    values = {slot: data["record"].get(slot) for slot in SLOTS}
    record = {slot: float(value) if isinstance(value, int | float) else math.nan for slot, value in values.items()}
    return Rank(rank=int(name), host=host, alive=data.get("alive") is True, record=record)


def _of_newest_start(told: Sequence[Told]) -> tuple[Told, ...]:
    """A node that is no part of the newest start may still show the one before."""
    newest = max(told, key=lambda own: own.started, default=None)
    if newest is None:
        return ()
    return tuple(own for own in told if own.facts.get("attempt") == newest.facts.get("attempt"))
