"""``outgrow monitor up`` and ``down``: bring what runs to what the site says, part by part, and end what was started."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.stack import access, node_agent
from outgrow.monitoring.stack.access import Client
from outgrow.monitoring.stack.installed import Installed, PartName, absence, find_all
from outgrow.monitoring.stack.part import Outcome, Part, Result
from outgrow.monitoring.stack.parts import make_parts, port_of, prepare, wanted, write_files
from outgrow.monitoring.stack.ports import check_port
from outgrow.monitoring.stack.processes import (
    Started,
    end,
    last_lines,
    locked,
    log_path,
    read_started,
    signal_process,
    start,
    write_started,
)
from outgrow.recipes.schema.options import clear_text
from outgrow.recipes.schema.site import Site

Action: TypeAlias = Literal["start", "restart", "reload", "keep"]

NAMES: tuple[PartName, ...] = ("prometheus", "alertmanager", "grafana")
PATIENCE_S = 60.0
"""How long a program may take until it answers: Prometheus reads what it had not yet compacted, Grafana makes its database."""

_RELOAD_S = 10.0
_POLL_S = 0.1
_DONE: Mapping[Action, Result] = {"start": "started", "restart": "restarted", "reload": "reloaded", "keep": "running"}


def stack_folder(site: Site) -> Path:
    return node_folder(site) / "stack"


def decide(part: Part, known: Started | None, *, alive: bool) -> Action:
    """What has to be done about a part that was started as ``known`` says. Pure."""
    if known is None or not alive:
        return "start"
    if part.digest("restart") != known.restart:
        return "restart"
    return "reload" if part.digest("reload") != known.reload else "keep"


def up(site: Site, *, patience_s: float = PATIENCE_S) -> list[Outcome]:
    """What became of each part. What runs as the site says is left alone.

    Raises ``SiteError`` for a taken port or an unusable password or certificate, before anything is started.
    """
    folder = stack_folder(site)
    with locked(folder):
        known, installed = read_started(folder), find_all()
        names = wanted(site.monitoring, installed)
        setup = prepare(site, folder)
        _check_ports(site, names, known)
        dropped = [known.pop(name) for name in NAMES if name in known and name not in names]
        end((one.pid, one.pid_start) for one in dropped)
        done = [node_agent.up(site, known, setup.password_hash)]
        write_started(folder, known)
        parts = make_parts(replace(setup, agent_url=done[0].url), installed)
        done += _bring_up(parts, folder, known, site, patience_s)
    return done + [_left_out(name, site, installed) for name in NAMES if name not in names]


def down(site: Site) -> list[tuple[PartName, Started]]:
    """The parts that were running and have been ended: those that ``up`` has started, and nothing else."""
    folder = stack_folder(site)
    if not folder.exists():
        return []
    with locked(folder):
        running = [(name, one) for name, one in read_started(folder).items() if one.alive]
        end((one.pid, one.pid_start) for _, one in running)
        write_started(folder, {})
    return running


def _check_ports(site: Site, names: tuple[PartName, ...], known: Mapping[PartName, Started]) -> None:
    """Raises ``SiteError`` where a part would have to start on a port that is not free."""
    for name in names:
        port, key = port_of(site.monitoring, name)
        before = known.get(name)
        its_own = before is not None and before.alive and before.url.endswith(f":{port}")
        if not its_own:
            check_port(name, site.monitoring.address, port, key)


def _left_out(name: PartName, site: Site, installed: Mapping[PartName, Installed]) -> Outcome:
    if name not in installed:
        return Outcome(name=name, result="missing", text=absence(name))
    why = "samples are sent on, and shown there" if site.monitoring.remote_write is not None else "there is no Prometheus"
    return Outcome(name=name, result="not needed", text=why)


# --- the one place that acts ------------------------------------------------------------------------------------------


def _bring_up(parts: list[Part], folder: Path, known: dict[PartName, Started], site: Site, patience_s: float) -> list[Outcome]:
    """All are started before any is waited for. ``known`` is kept on disk with each step: a kill loses track of nothing."""
    logs = {part.name: _size(log_path(folder, part.name)) for part in parts}
    since = time.time()
    actions: dict[PartName, Action] = {}
    for part in parts:
        before = known.get(part.name)
        actions[part.name] = decide(part, before, alive=before is not None and before.alive)
        write_files(part, folder)
        _act(part, actions[part.name], folder, known)
        write_started(folder, known)
    secrets = _secrets(site)
    until, client, done = time.monotonic() + patience_s, access.client(site.monitoring.access), list[Outcome]()
    for part in parts:
        outcome = _wait(part, actions[part.name], known[part.name], client, until, since)
        if outcome.result in ("failed", "starting"):
            lines = "\n".join(last_lines(log_path(folder, part.name), logs[part.name]))
            outcome = replace(outcome, text=f"{outcome.text}; {log_path(folder, part.name)} says:\n{_masked(lines, secrets)}")
        elif outcome.result == "reloaded":
            known[part.name] = replace(known[part.name], reload=part.digest("reload"))
        done.append(outcome)
    write_started(folder, known)
    return done


def _act(part: Part, action: Action, folder: Path, known: dict[PartName, Started]) -> None:
    before = known.get(part.name)
    if action == "reload" and before is not None:
        signal_process(before.pid, before.pid_start, signal.SIGHUP)
    if action in ("keep", "reload"):
        return
    if before is not None:
        end([(before.pid, before.pid_start)])
    pid, pid_start = start(part.command, log_path(folder, part.name))
    known[part.name] = Started(
        pid=pid,
        # NaN where it has ended already; no process equals it.
        pid_start=-1.0 if math.isnan(pid_start) else pid_start,
        started=time.time(),
        url=part.url,
        version=part.version,
        restart=part.digest("restart"),
        reload=part.digest("reload"),
    )


def _wait(part: Part, action: Action, one: Started, client: Client, until: float, since: float) -> Outcome:
    """What a part that was acted on has come to."""
    known = Outcome(name=part.name, result=_DONE[action], url=part.url, pid=one.pid, version=one.version)
    while one.alive:
        if _answers(client, part.ready):
            if action == "reload" and not _reloaded(client, part, since):
                return replace(known, result="failed", text="it goes on with its former configuration")
            return known
        if time.monotonic() > until:
            return replace(known, result="starting", text="it runs, and does not answer yet")
        time.sleep(_POLL_S)
    return replace(known, result="failed", pid=0, text="it has ended")


def _answers(client: Client, url: str) -> bool:
    with suppress(OSError):
        client.get(url)
        return True
    return False


def _reloaded(client: Client, part: Part, since: float) -> bool:
    """Whether a program has taken a configuration on since ``since``, as its own metrics tell."""
    pattern = re.compile(rf"^{part.name}_config_last_reload_success_timestamp_seconds (\S+)$", re.MULTILINE)
    until = time.monotonic() + _RELOAD_S
    while time.monotonic() < until:
        with suppress(OSError):
            found = pattern.search(client.get(f"{part.url}/metrics").decode())
            if found and float(found[1]) >= since:
                return True
        time.sleep(_POLL_S)
    return False


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _secrets(site: Site) -> list[str]:
    there = site.monitoring.remote_write
    texts = [clear_text(site.monitoring.alert_webhook), clear_text(there.url) if there else ""]
    return [text for text in texts if text]


def _masked(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
