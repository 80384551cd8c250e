"""Starting the one agent of a node, and finding the one that is there: ``agent.json`` in the node's folder says who it is.

An agent outlives whoever started it, however that ends: it has a session of its own, is nobody's child, and holds no pipe or
socket of its starter. The site is handed to it in memory, so that its secrets stand in no file, argument or environment.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import JsonDict, Record
from outgrow.errors import MonitorError
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.recording.recorder import start_ticks
from outgrow.monitoring.recording.slots import FORMAT
from outgrow.recipes.schema.site import Site

FILE, LOCK, LOG = "agent.json", "agent.lock", "agent.log"
READY_S = 20.0
END_S = 15.0

_PAUSE_S = 0.05
_TRIES = 3
_TAIL_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class Running(Record):
    """The agent of a node as ``agent.json`` tells: ``pid`` and ``pid_start`` (clock ticks since boot) name its process, others
    reach it at ``url``, and with ``keep`` it does not end by itself. ``started`` is in Unix seconds, ``format`` that of the
    records which it can read."""

    pid: int
    pid_start: float
    url: str
    address: str
    port: int
    started: float
    keep: bool
    format: int

    @property
    def is_alive(self) -> bool:
        return not math.isnan(self.pid_start) and start_ticks(self.pid) == self.pid_start


def find_agent(node: Path) -> Running | None:
    """The living agent of a node's folder."""
    try:
        found = Running.from_dict(json.loads((node / FILE).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.is_alive else None


def ensure_agent(site: Site) -> str:
    """One line for a person: where the node's agent is, that it was started, or why there is none. Never raises or waits.

    With ``monitoring.agent: false`` it starts none. One that is idle takes the call as a sign that a run is coming, and one of
    another version of outgrow, which cannot read this one's records, is replaced.
    """
    try:
        node = node_folder(site)
        _ask_to_stay(node)
        running = find_agent(node)
        if running is not None and running.format == FORMAT:
            return f"node agent at {running.url}"
        if not site.monitoring.agent:
            return "no node agent (monitoring: agent: false)"
        if running is not None:
            os.kill(running.pid, signal.SIGTERM)  # the next one waits for its seat
        os.close(start_agent(site, keep=running is not None and running.keep))
        return f"node agent started, see {node / FILE}"
    except Exception as error:  # a run goes on without being watched
        return f"no node agent: {error}"


def keep_agent(site: Site) -> Running:
    """The node's agent, made to stay: one that would end when idle is replaced, at once, by one that does not.

    Waits until it answers. Raises ``MonitorError`` with the end of its log where it does not.
    """
    node = node_folder(site)
    said = _log_size(node)
    for _ in range(_TRIES):  # a run that starts at this moment may have started one too
        running = find_agent(node)
        if running is not None and running.keep and running.format == FORMAT:
            return running
        end_agent(node)
        with open(start_agent(site, keep=True), "rb") as serving:
            select.select([serving], [], [], READY_S)
        if find_agent(node) is None:
            break
    raise MonitorError("the node agent did not start", where=str(node), hint=f"its log says:\n{_log_from(node, said)}")


def end_agent(node: Path, timeout_s: float = END_S) -> bool:
    """End the agent of a node, and whether there was one. Only the very process that wrote ``agent.json`` is touched."""
    running = find_agent(node)
    if running is None:
        return False
    for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, number)
        if _has_ended(running, patience_s):
            break
    return True


def start_agent(site: Site, *, keep: bool) -> int:
    """Start an agent, detached; returns before it answers. Where one is there already, the new one ends by itself.

    What is returned is a descriptor that comes to its end of file when the agent serves or has ended. Raises ``OSError`` where
    the node's folder cannot be made.
    """
    node = node_folder(site)
    node.mkdir(parents=True, exist_ok=True, mode=0o700)
    serving, theirs = os.pipe()
    with contextlib.ExitStack() as held:
        held.callback(os.close, theirs)
        log = _open_log(node / LOG)
        held.callback(os.close, log)
        # Not a pipe: what is in it stays whole when this process ends right after, and nobody waits to be read.
        given = held.enter_context(open(os.memfd_create("site", os.MFD_CLOEXEC), "w+b"))
        given.write(json.dumps(_needed(site)).encode())
        given.seek(0)
        arguments = ["--detach", f"--serving={theirs}", *(["--keep"] if keep else [])]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "outgrow.monitoring.agent", *arguments],
            env=_environment(),
            cwd="/",
            stdin=given,
            stdout=log,
            stderr=log,
            pass_fds=(theirs,),
            start_new_session=True,
        )
    # What was started ends at once, and leaves the agent behind as nobody's child.
    threading.Thread(target=process.wait, name="outgrow-reap", daemon=True).start()
    return serving


def _needed(site: Site) -> JsonDict:
    """The site without the secrets that an agent has no use for."""
    data = site.to_dict()
    data["monitoring"] |= {"remote_write": None, "alert_webhook": ""}
    data["tiers"] = [tier | {"options": {}} for tier in data["tiers"]]
    return data


def _environment() -> dict[str, str]:
    """That of this process, for one that imports the same; what Ray says of a worker is not true of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _open_log(path: Path) -> int:
    """A descriptor to append to; of nothing where there is no room for a log."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _ask_to_stay(node: Path) -> None:
    """Touch the lock: an agent that is about to end looks at it once more after it has taken ``agent.json`` away."""
    with contextlib.suppress(OSError):
        os.utime(node / LOCK)


def _log_size(node: Path) -> int:
    try:
        return (node / LOG).stat().st_size
    except OSError:
        return 0


def _log_from(node: Path, begin: int) -> str:
    try:
        text = (node / LOG).read_bytes()[begin:]
    except OSError:
        return "(there is none)"
    return text[-_TAIL_BYTES:].decode(errors="replace")


def _has_ended(running: Running, patience_s: float) -> bool:
    """Whether the agent is gone, after waiting up to ``patience_s`` for it."""
    deadline = time.monotonic() + patience_s
    while running.is_alive and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return not running.is_alive
