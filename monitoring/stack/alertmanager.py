"""Alertmanager's command and configuration: one receiver, the site's webhook where it has one. Pure."""

from __future__ import annotations

from typing import Any

from outgrow.monitoring.stack.installed import Installed
from outgrow.monitoring.stack.part import WEB_FILE, ConfigFile, Part, Setup, to_yaml, web_file
from outgrow.recipes.schema.options import clear_text

CONFIG_FILE = "alertmanager/alertmanager.yml"
DATA = "alertmanager/data"


def alertmanager(setup: Setup, installed: Installed) -> Part:
    port = setup.monitoring.alertmanager_port
    url = setup.url(port)
    words = [
        str(installed.path),
        f"--config.file={setup.path(CONFIG_FILE)}",
        f"--storage.path={setup.path(DATA)}",
        f"--web.listen-address={setup.listen(port)}",
        f"--web.external-url={url}",
        # Alone: else it listens on a second port, on all addresses, for others of its kind.
        "--cluster.listen-address=",
    ]
    # The webhook's URL may be a secret, and stands in a file that only the user may read.
    files = [ConfigFile(path=CONFIG_FILE, text=to_yaml(config(setup)), on_change="reload")]
    if setup.has_access:
        words.append(f"--web.config.file={setup.path(WEB_FILE)}")
        files.append(web_file(setup))
    return Part(
        name="alertmanager",
        command=tuple(words),
        version=installed.version,
        files=tuple(files),
        folders=(DATA,),
        url=url,
        ready=f"{url}/-/ready",
        port=port,
        port_key="monitoring.alertmanager_port",
    )


def config(setup: Setup) -> dict[str, Any]:
    """``alertmanager.yml`` as plain data: alerts of one kind, run and node come as one message, again after 4 hours."""
    receiver: dict[str, Any] = {"name": "outgrow"}
    webhook = clear_text(setup.monitoring.alert_webhook)
    if webhook:
        receiver["webhook_configs"] = [{"url": webhook, "send_resolved": True}]
    return {
        "route": {
            "receiver": "outgrow",
            "group_by": ["alertname", "run", "node"],
            "group_wait": "10s",
            "group_interval": "1m",
            "repeat_interval": "4h",
        },
        "receivers": [receiver],
    }
