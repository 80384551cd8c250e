"""Which programs a site wants of those that are installed, and the configuration of each, from what comes with outgrow."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import yaml

from outgrow.monitoring.dashboards.written import for_site
from outgrow.monitoring.stack import access, grafana
from outgrow.monitoring.stack.alertmanager import alertmanager
from outgrow.monitoring.stack.installed import Installed, PartName
from outgrow.monitoring.stack.part import WEB_FILE, Part, Setup
from outgrow.monitoring.stack.processes import make_private, write_private
from outgrow.monitoring.stack.prometheus import prometheus
from outgrow.recipes.schema.monitoring import Monitoring
from outgrow.recipes.schema.site import Site

_OURS = Path(__file__).resolve().parent.parent
RULES = _OURS / "alerts/outgrow.rules.yml"


def wanted(monitoring: Monitoring, installed: Mapping[PartName, Installed]) -> tuple[PartName, ...]:
    """Those of the installed programs that have something to do; none of them has without Prometheus."""
    if "prometheus" not in installed:
        return ()
    rest: tuple[PartName, ...] = ("prometheus", "alertmanager", "grafana")
    return ("prometheus",) if monitoring.remote_write is not None else tuple(name for name in rest if name in installed)


def port_of(monitoring: Monitoring, name: PartName) -> tuple[int, str]:
    """The port of a program and the key that it is set by."""
    return int(getattr(monitoring, f"{name}_port")), f"monitoring.{name}_port"


def prepare(site: Site, folder: Path, agent_url: str = "") -> Setup:
    """What the configuration follows from, on this machine. Raises ``SiteError`` for a password or certificate of no use."""
    monitoring = site.monitoring
    if monitoring.remote_write is not None and monitoring.remote_write.user:
        access.read_password(monitoring.remote_write.password_file, "monitoring.remote_write.password_file")
    return Setup(
        monitoring=monitoring,
        folder=PurePosixPath(folder),
        agent_url=agent_url,
        origin=socket.gethostname(),
        password_hash=_password_hash(monitoring, folder),
        tls_name=access.certificate_name(monitoring.access),
        ray_dashboard=site.cluster.dashboard,
    )


def make_parts(setup: Setup, programs: Mapping[PartName, Installed]) -> list[Part]:
    """The programs that ``wanted`` names, each with its configuration."""
    names = wanted(setup.monitoring, programs)
    has_alertmanager = "alertmanager" in names
    parts = []
    if "prometheus" in names:
        rules = "" if setup.sends else RULES.read_text()
        parts.append(prometheus(setup, programs["prometheus"], rules=rules, alertmanager=has_alertmanager))
    if has_alertmanager:
        parts.append(alertmanager(setup, programs["alertmanager"]))
    if "grafana" in names:
        asked = access.client(setup.monitoring.access)
        parts.append(
            grafana.grafana(
                setup,
                programs["grafana"],
                dashboards=for_site(setup.ray_dashboard),
                password=asked.password,
                certificate=Path(asked.certificate).read_text() if asked.certificate else "",
                alertmanager=has_alertmanager,
            )
        )
    return parts


def write_files(part: Part, folder: Path) -> None:
    """The files of a part below ``folder``, those that have changed alone; of Grafana also its secrets where there are none."""
    for below in part.folders:
        make_private(folder / below)
    for file in part.files:
        path = folder / file.path
        if not path.exists() or path.read_text() != file.text:
            write_private(path, file.text)
    if part.name == "grafana":
        make_secrets(folder)
        known = {folder / file.path for file in part.files}
        for path in (folder / grafana.DASHBOARDS).glob("*.json"):
            if path not in known:  # of an older version
                path.unlink()


def make_secrets(folder: Path) -> None:
    """Grafana's password and the key that its database is encrypted with: random, and kept."""
    for below in (grafana.PASSWORD_FILE, grafana.SECRET_KEY_FILE):
        if not (folder / below).exists():
            write_private(folder / below, secrets.token_urlsafe(24))


def _password_hash(monitoring: Monitoring, folder: Path) -> str:
    if not monitoring.access.user:
        return ""
    password = access.read_password(monitoring.access.password_file, "monitoring.access.password_file")
    try:
        before = yaml.safe_load((folder / WEB_FILE).read_text())["basic_auth_users"][monitoring.access.user]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        before = ""
    return access.password_hash(password, str(before))
