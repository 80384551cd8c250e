"""Grafana's command, settings and provisioning: the data source, the dashboards, and nothing that calls home. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outgrow.monitoring.stack.installed import Installed
from outgrow.monitoring.stack.part import ConfigFile, Part, Setup, to_yaml

PROMETHEUS_UID = "outgrow-prometheus"
ALERTMANAGER_UID = "outgrow-alertmanager"
USER = "admin"

SETTINGS_FILE = "grafana/grafana.ini"
PASSWORD_FILE = "grafana/password"
SECRET_KEY_FILE = "grafana/secret-key"
PROVISIONING = "grafana/provisioning"
DASHBOARDS = "grafana/dashboards"
DATA, LOGS, PLUGINS = "grafana/data", "grafana/logs", "grafana/plugins"

_HOME = "outgrow-run.json"
_DEBIAN_HOME = Path("/usr/share/grafana")


def grafana(
    setup: Setup,
    installed: Installed,
    *,
    dashboards: Mapping[str, str],
    password: str = "",
    certificate: str = "",
    alertmanager: bool,
) -> Part:
    """``dashboards`` are texts by file name; ``password`` and ``certificate`` those of ``monitoring.access``, in clear."""
    port = setup.monitoring.grafana_port
    url = setup.url(port)
    sources = to_yaml(data_sources(setup, password=password, certificate=certificate, alertmanager=alertmanager))
    home = _HOME if _HOME in dashboards else ""
    files = [
        ConfigFile(path=SETTINGS_FILE, text=settings(setup, home=home), on_change="restart"),
        ConfigFile(path=f"{PROVISIONING}/datasources/outgrow.yaml", text=sources, on_change="restart"),
        ConfigFile(path=f"{PROVISIONING}/dashboards/outgrow.yaml", text=to_yaml(providers(setup)), on_change="restart"),
    ]
    files += [
        ConfigFile(path=f"{DASHBOARDS}/{name}", text=text, on_change="nothing") for name, text in sorted(dashboards.items())
    ]
    return Part(
        name="grafana",
        command=_command(setup, installed),
        version=installed.version,
        files=tuple(files),
        folders=(DATA, LOGS, PLUGINS, f"{PROVISIONING}/plugins", f"{PROVISIONING}/alerting"),
        url=url,
        ready=f"{url}/api/health",
        port=port,
        port_key="monitoring.grafana_port",
    )


def _command(setup: Setup, installed: Installed) -> tuple[str, ...]:
    server = () if installed.path.name == "grafana-server" else ("server",)
    home = home_of(installed.path)
    at_home = (f"--homepath={home}",) if home else ()
    return (str(installed.path), *server, *at_home, f"--config={setup.path(SETTINGS_FILE)}")


def home_of(program: Path) -> Path | None:
    """The folder with Grafana's own files: above the ``bin`` of an unpacked release, else where packages put it."""
    above = program.resolve().parent.parent
    return next((home for home in (above, _DEBIAN_HOME) if (home / "conf/defaults.ini").is_file()), None)


def settings(setup: Setup, *, home: str) -> str:
    """``grafana.ini``: on the site's address alone, nobody without the password, no word to anybody outside."""
    access = setup.monitoring.access
    server: dict[str, object] = {
        "protocol": "https" if setup.tls else "http",
        "http_addr": setup.monitoring.address,
        "http_port": setup.monitoring.grafana_port,
        "root_url": setup.url(setup.monitoring.grafana_port),
    }
    if setup.tls:
        server |= {"cert_file": setup.seen(access.certificate), "cert_key": setup.seen(access.key)}
    sections: dict[str, dict[str, object]] = {
        "paths": {
            "data": setup.path(DATA),
            "logs": setup.path(LOGS),
            "plugins": setup.path(PLUGINS),
            "provisioning": setup.path(PROVISIONING),
        },
        "server": server,
        "security": {
            "admin_user": USER,
            "admin_password": f"$__file{{{setup.path(PASSWORD_FILE)}}}",
            "secret_key": f"$__file{{{setup.path(SECRET_KEY_FILE)}}}",
            "disable_gravatar": "true",
            "cookie_secure": str(setup.tls).lower(),
        },
        "auth.anonymous": {"enabled": "false"},
        "users": {"allow_sign_up": "false", "allow_org_create": "false"},
        "snapshots": {"external_enabled": "false"},
        "public_dashboards": {"enabled": "false"},
        "analytics": {
            "reporting_enabled": "false",
            "check_for_updates": "false",
            "check_for_plugin_updates": "false",
            "feedback_links_enabled": "false",
        },
        "news": {"news_feed_enabled": "false"},
        "plugins": {"preinstall_disabled": "true", "plugin_admin_enabled": "false"},
        "log": {"mode": "console", "level": "warn"},
    }
    if home:
        sections["dashboards"] = {"default_home_dashboard_path": setup.path(f"{DASHBOARDS}/{home}")}
    blocks = ("\n".join([f"[{name}]", *(f"{key} = {value}" for key, value in keys.items())]) for name, keys in sections.items())
    return "\n\n".join(blocks) + "\n"


def data_sources(setup: Setup, *, password: str, certificate: str, alertmanager: bool) -> dict[str, Any]:
    """Prometheus, the default, and Alertmanager; the dashboards know them by their uids."""
    monitoring = setup.monitoring
    timing = {"timeInterval": f"{monitoring.scrape_s}s", "httpMethod": "POST"}
    sources = [
        _source(setup, "Prometheus", "prometheus", PROMETHEUS_UID, monitoring.prometheus_port, password, certificate, timing)
        | {"isDefault": True}
    ]
    if alertmanager:
        how = {"implementation": "prometheus"}
        port = monitoring.alertmanager_port
        sources.append(_source(setup, "Alertmanager", "alertmanager", ALERTMANAGER_UID, port, password, certificate, how))
    return {"apiVersion": 1, "datasources": sources}


def _source(
    setup: Setup, name: str, kind: str, uid: str, port: int, password: str, certificate: str, how: Mapping[str, object]
) -> dict[str, Any]:
    public, secret = dict(how), dict[str, str]()
    source: dict[str, Any] = {
        "name": name,
        "type": kind,
        "uid": uid,
        "access": "proxy",
        "url": setup.url(port),
        "editable": False,
    }
    if setup.monitoring.access.user:
        source |= {"basicAuth": True, "basicAuthUser": setup.monitoring.access.user}
        secret["basicAuthPassword"] = _plain(password)
    if setup.tls:
        public |= {"tlsAuthWithCACert": True, "serverName": setup.tls_name}
        secret["tlsCACert"] = _plain(certificate)
    source["jsonData"] = public
    return source | ({"secureJsonData": secret} if secret else {})


def _plain(text: str) -> str:
    """A text that stays as it is where Grafana puts variables of the environment in."""
    return text.replace("$", "$$")


def providers(setup: Setup) -> dict[str, Any]:
    """The dashboards' folder, read-only in Grafana: a copy can be changed there, ours come with outgrow."""
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "outgrow",
                "folder": "outgrow",
                "type": "file",
                "disableDeletion": True,
                "allowUiUpdates": False,
                "updateIntervalSeconds": 30,
                "options": {"path": setup.path(DASHBOARDS)},
            }
        ],
    }
