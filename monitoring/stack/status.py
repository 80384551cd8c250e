"""``outgrow monitor status``: what of the stack is there, which targets Prometheus reaches, and which alerts fire."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import outgrow
from outgrow.monitoring.agent.start import find_agent
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.stack import grafana
from outgrow.monitoring.stack.access import Client, client, shown_url
from outgrow.monitoring.stack.installed import PartName
from outgrow.monitoring.stack.processes import Started, read_started
from outgrow.monitoring.stack.up import NAMES, stack_folder
from outgrow.recipes.schema.site import Site

PartState: TypeAlias = Literal["running", "not answering", "ended", "not started"]

_READY: Mapping[PartName, str] = {
    "agent": "/health",
    "prometheus": "/-/ready",
    "alertmanager": "/-/ready",
    "grafana": "/api/health",
}


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """``ended``: started by ``outgrow monitor up``, and gone without ``down``. ``since`` is in Unix seconds, 0: unknown."""

    name: PartName
    state: PartState
    url: str = ""
    pid: int = 0
    version: str = ""
    since: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """What Prometheus scrapes; ``error`` is empty where it can."""

    job: str
    address: str
    node: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Alert:
    """``state`` is pending or firing."""

    name: str
    state: str
    labels: Mapping[str, str]
    summary: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """``password_file`` is that of Grafana's user, None where there is none. ``behind_s`` are the seconds that samples sent to
    another Prometheus are late, None where none are sent or it does not say."""

    parts: tuple[PartStatus, ...]
    targets: tuple[Target, ...] = ()
    alerts: tuple[Alert, ...] = ()
    password_file: Path | None = None
    behind_s: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether something has been started, and nothing of it is missing."""
        states = {part.state for part in self.parts}
        return "running" in states and not states & {"ended", "not answering"}


def status(site: Site) -> Status:
    """Raises ``SiteError`` where the password of the site cannot be read."""
    folder, asked = stack_folder(site), client(site.monitoring.access)
    known = read_started(folder)
    parts = [_agent(site, known.get("agent"), asked)]
    parts += [_part(name, known.get(name), asked, site.monitoring.address) for name in NAMES]
    password = folder / grafana.PASSWORD_FILE
    server = known.get("prometheus")
    found = Status(parts=tuple(parts), password_file=password if password.exists() else None)
    if server is None or not server.alive:
        return found
    try:
        targets = _targets(asked.get_json(f"{server.url}/api/v1/targets?state=active"))
        if site.monitoring.remote_write is not None:
            behind = behind_s(asked.get(f"{server.url}/metrics").decode())
            return Status(parts=found.parts, targets=targets, password_file=found.password_file, behind_s=behind)
        alerts = _alerts(asked.get_json(f"{server.url}/api/v1/alerts"))
    except OSError:
        return found
    return Status(parts=found.parts, targets=targets, alerts=alerts, password_file=found.password_file)


def behind_s(metrics: str) -> float | None:
    """Seconds that the newest sample sent on is behind the newest one there is, from Prometheus's own metrics."""

    def value(name: str) -> float:
        found = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
        return float(found[1]) if found else math.nan

    newest = value("prometheus_remote_storage_highest_timestamp_in_seconds")
    sent = value("prometheus_remote_storage_queue_highest_sent_timestamp_seconds")
    return newest - sent if newest > 0 and sent > 0 else None


def _agent(site: Site, known: Started | None, asked: Client) -> PartStatus:
    running = find_agent(node_folder(site))
    if running is None:
        return PartStatus(name="agent", state="ended" if known is not None else "not started")
    return PartStatus(
        name="agent",
        state=_state("agent", running.url, asked),
        url=shown_url(running.url, site.monitoring.address),
        pid=running.pid,
        version=outgrow.__version__,
        since=running.started,
    )


def _part(name: PartName, known: Started | None, asked: Client, address: str) -> PartStatus:
    if known is None:
        return PartStatus(name=name, state="not started")
    if not known.alive:
        return PartStatus(name=name, state="ended", version=known.version)
    return PartStatus(
        name=name,
        state=_state(name, known.url, asked),
        url=shown_url(known.url, address),
        pid=known.pid,
        version=known.version,
        since=known.started,
    )


def _state(name: PartName, url: str, asked: Client) -> PartState:
    try:
        asked.get(url + _READY[name])
    except OSError:
        return "not answering"
    return "running"


def _targets(data: Any) -> tuple[Target, ...]:
    found = [
        Target(
            job=one["labels"].get("job", ""),
            address=one["labels"].get("instance", ""),
            node=one["labels"].get("node", ""),
            error="" if one["health"] == "up" else one["lastError"] or "not scraped yet",
        )
        for one in data["activeTargets"]
    ]
    return tuple(sorted(found, key=lambda one: (one.job, one.address)))


def _alerts(data: Any) -> tuple[Alert, ...]:
    found = [
        Alert(
            name=one["labels"]["alertname"],
            state=one["state"],
            labels={key: value for key, value in one["labels"].items() if key != "alertname"},
            summary=one.get("annotations", {}).get("summary", ""),
        )
        for one in data["alerts"]
    ]
    return tuple(sorted(found, key=lambda one: (one.state, one.name, sorted(one.labels.items()))))
