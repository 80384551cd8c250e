"""Prometheus's command and configuration, as a server with our rules or as an agent that sends all on. Pure."""

from __future__ import annotations

from typing import Any

from outgrow.monitoring.stack.installed import Installed
from outgrow.monitoring.stack.part import WEB_FILE, ConfigFile, Part, Setup, to_yaml, web_file
from outgrow.recipes.schema.options import clear_text

AGENTS_JOB = "outgrow-agents"
RAY_JOB = "ray"
ORIGIN = "origin"
"""The label that samples sent on carry besides their own: the host they come from. The agents of two nodes that both listen on
loopback would otherwise give one series ``up{instance="127.0.0.1:9640"}``."""

CONFIG_FILE = "prometheus/prometheus.yml"
RULES_FILE = "prometheus/outgrow.rules.yml"
DATA, AGENT_DATA = "prometheus/data", "prometheus/agent-data"
"""Apart, as a server and an agent keep files of different formats."""

_DISCOVERY_S = 15
_LATE = "1d"
"""What others send may be as old as this: a line that was away for hours loses nothing."""
_NO_SITE = "none"
"""Of all web pages, those of no origin may ask this server from a browser."""


def prometheus(setup: Setup, installed: Installed, *, rules: str, alertmanager: bool) -> Part:
    """``rules`` is the text of the rule file; ``alertmanager`` whether there is one to tell."""
    port = setup.monitoring.prometheus_port
    url = setup.url(port)
    files = [ConfigFile(path=CONFIG_FILE, text=to_yaml(config(setup, alertmanager=alertmanager)), on_change="reload")]
    if not setup.sends:
        files.append(ConfigFile(path=RULES_FILE, text=rules, on_change="reload"))
    if setup.has_access:
        files.append(web_file(setup))
    return Part(
        name="prometheus",
        command=_command(setup, installed, url),
        version=installed.version,
        files=tuple(files),
        folders=(AGENT_DATA if setup.sends else DATA,),
        url=url,
        ready=f"{url}/-/ready",
        port=port,
        port_key="monitoring.prometheus_port",
    )


def _command(setup: Setup, installed: Installed, url: str) -> tuple[str, ...]:
    words = [
        str(installed.path),
        f"--config.file={setup.path(CONFIG_FILE)}",
        f"--web.listen-address={setup.listen(setup.monitoring.prometheus_port)}",
        f"--web.external-url={url}",
        f"--web.cors.origin={_NO_SITE}",
    ]
    if setup.has_access:
        words.append(f"--web.config.file={setup.path(WEB_FILE)}")
    if setup.sends:
        # Prometheus 3 made a flag of its own of it.
        words.append("--agent" if installed.release >= (3, 0) else "--enable-feature=agent")
        words.append(f"--storage.agent.path={setup.path(AGENT_DATA)}")
        # What is not sent by then is sent after the next start; by default a minute, and it is killed before that.
        words.append("--storage.remote.flush-deadline=5s")
    else:
        words.append(f"--storage.tsdb.path={setup.path(DATA)}")
        words.append(f"--storage.tsdb.retention.time={setup.monitoring.keep_days}d")
    if setup.monitoring.receive:
        words.append("--web.enable-remote-write-receiver")
    return tuple(words)


def config(setup: Setup, *, alertmanager: bool) -> dict[str, Any]:
    """``prometheus.yml`` as plain data."""
    monitoring, scheme = setup.monitoring, "https" if setup.tls else "http"
    every = f"{monitoring.scrape_s}s"
    timeout = f"{min(10, monitoring.scrape_s)}s"
    found: dict[str, Any] = {
        "global": {"scrape_interval": every, "scrape_timeout": timeout, "evaluation_interval": every},
        "scrape_configs": _jobs(setup, scheme),
    }
    if monitoring.remote_write is not None:
        found["global"]["external_labels"] = {ORIGIN: setup.origin}
        found["remote_write"] = [_remote_write(setup)]
        return found
    found["rule_files"] = [setup.path(RULES_FILE)]
    if alertmanager:
        there = {"scheme": scheme, "static_configs": [{"targets": [setup.target(monitoring.alertmanager_port)]}]}
        found["alerting"] = {"alertmanagers": [there | setup.http_client()]}
    if monitoring.receive:
        found["storage"] = {"tsdb": {"out_of_order_time_window": _LATE}}
    return found


def _jobs(setup: Setup, scheme: str) -> list[dict[str, Any]]:
    """Every agent that this node's agent knows of, and what Ray lists."""
    agents = {
        "job_name": AGENTS_JOB,
        # A target is labelled with its node, so that ``up`` is too; what an agent says of nodes stands as it says it.
        "honor_labels": True,
        "scheme": scheme,
        "http_sd_configs": [_discovery(setup, "/targets")],
    } | setup.http_client()
    # By our agent too, which passes on of Ray's file in /tmp what this user or root has written, and nothing but addresses.
    return [agents, {"job_name": RAY_JOB, "http_sd_configs": [_discovery(setup, "/targets/ray")]}]


def _discovery(setup: Setup, path: str) -> dict[str, Any]:
    return {"url": f"{setup.agent_url}{path}", "refresh_interval": f"{_DISCOVERY_S}s"} | setup.http_client()


def _remote_write(setup: Setup) -> dict[str, Any]:
    there = setup.monitoring.remote_write
    assert there is not None
    found: dict[str, Any] = {"name": "home", "url": clear_text(there.url)}
    if there.user:
        found["basic_auth"] = {"username": there.user, "password_file": setup.seen(there.password_file)}
    if there.certificate:
        found["tls_config"] = {"ca_file": setup.seen(there.certificate)}
    return found
