"""The node agent as a part of the stack: made to stay, and ended by ``down`` where ``up`` had started it."""

from __future__ import annotations

import hashlib
import json

import outgrow
from outgrow.errors import MonitorError
from outgrow.monitoring.agent.start import Running, end_agent, find_agent, keep_agent
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.stack.access import url_of
from outgrow.monitoring.stack.installed import PartName
from outgrow.monitoring.stack.part import Outcome, Result
from outgrow.monitoring.stack.processes import Started
from outgrow.recipes.schema.site import Site


def up(site: Site, known: dict[PartName, Started], password_hash: str) -> Outcome:
    """What became of the agent; ``known`` has it afterwards where it is ours.

    One that somebody else has made to stay is left alone. One that a run has started, and ours where the site has changed, is
    replaced; runs do not notice.
    """
    node, digest, before = node_folder(site), _digest(site, password_hash), known.get("agent")
    running = find_agent(node)
    ours = running is not None and before is not None and (running.pid, running.pid_start) == (before.pid, before.pid_start)
    result: Result = "started"
    if running is not None and ours and before is not None and before.restart != digest:
        end_agent(node)
        result = "restarted"
    try:
        kept = keep_agent(site)
    except (MonitorError, OSError) as error:
        known.pop("agent", None)
        url = url_of(site.monitoring.address, site.monitoring.agent_port, tls=bool(site.monitoring.access.certificate))
        return Outcome(name="agent", result="failed", url=url, text=str(error))
    if running is not None and (kept.pid, kept.pid_start) == (running.pid, running.pid_start):
        result = "running"
        if not ours:
            known.pop("agent", None)
            return _outcome(kept, result, "not started by outgrow monitor up, which leaves it alone")
    else:
        known["agent"] = Started(
            pid=kept.pid,
            pid_start=kept.pid_start,
            started=kept.started,
            url=kept.url,
            version=outgrow.__version__,
            restart=digest,
            reload="",
        )
    other = kept.port != site.monitoring.agent_port
    text = f"port {site.monitoring.agent_port} is taken, so it listens on {kept.port}" if other else ""
    return _outcome(kept, result, text)


def _outcome(kept: Running, result: Result, text: str) -> Outcome:
    return Outcome(name="agent", result=result, url=kept.url, pid=kept.pid, version=outgrow.__version__, text=text)


def _digest(site: Site, password_hash: str) -> str:
    """Changes with what an agent was started with. Options are masked: secrets of buckets are no business of a file here."""
    data = site.model_dump(mode="json", by_alias=True)
    keys = ("folder", "address", "open", "access", "agent_port", "stall_after_s", "ray_discovery")
    known = [outgrow.__version__, data["storage"], data["storage_options"], data["tiers"]]
    known += [{key: data["monitoring"][key] for key in keys}, password_hash]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
