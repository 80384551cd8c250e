"""``outgrow monitor compose``: the same stack as containers, for a machine that has Docker and not the programs. Pure but for
``write``."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from outgrow.errors import MonitorError
from outgrow.monitoring.stack import access, grafana
from outgrow.monitoring.stack.installed import Installed, PartName
from outgrow.monitoring.stack.part import Part, Setup, to_yaml
from outgrow.monitoring.stack.parts import make_parts, prepare, write_files
from outgrow.monitoring.stack.processes import make_private, write_private
from outgrow.recipes.schema.site import Site

FILE = "docker-compose.yml"
INSIDE = PurePosixPath("/etc/outgrow")
"""Where the written folder is seen in each container."""


@dataclass(frozen=True)
class Image:
    """An image of a pinned release; ``command`` is the program in it, empty where its entry point needs no argument."""

    name: str
    version: str
    command: str


IMAGES: dict[PartName, Image] = {
    "prometheus": Image("prom/prometheus", "v2.53.4", "/bin/prometheus"),
    "alertmanager": Image("prom/alertmanager", "v0.28.1", "/bin/alertmanager"),
    "grafana": Image("grafana/grafana", "12.0.2", "/run.sh"),
}

_HEAD = """\
# Prometheus, Alertmanager and Grafana as outgrow monitor up configures them, in containers on the host's network.
# Start: docker compose up --detach     End: docker compose down
# The node agent runs outside: a run starts it, and outgrow monitor agent --keep keeps it.
# Written by outgrow monitor compose; write it again after a change of site.yaml, of a password or of outgrow itself.
"""


def write(site: Site, folder: Path) -> list[PartName]:
    """The services that the written ``folder`` starts. Raises ``MonitorError`` where it holds something else."""
    if folder.exists() and not (folder / FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MonitorError(
            "not an empty folder, and not one of outgrow monitor compose", where=str(folder), hint="name another"
        )
    monitoring = site.monitoring
    mounts = _access_mounts(site)
    setup = Setup(
        monitoring=monitoring,
        folder=INSIDE,
        agent_url=access.url_of(monitoring.address, monitoring.agent_port, tls=bool(monitoring.access.certificate)),
        origin=socket.gethostname(),
        password_hash=prepare(site, folder).password_hash,
        tls_name=access.certificate_name(monitoring.access),
        seen=lambda path: mounts[path],
        ray_dashboard=site.cluster.dashboard,
    )
    images = {name: Installed(path=Path(one.command), version=one.version.removeprefix("v")) for name, one in IMAGES.items()}
    make_private(folder)
    parts = make_parts(setup, images)
    for part in parts:
        write_files(part, folder)
    write_private(folder / FILE, _HEAD + to_yaml(services(parts, mounts)))
    return [part.name for part in parts]


def services(parts: Sequence[Part], mounts: dict[str, str]) -> dict[str, Any]:
    """The compose file as plain data; ``mounts`` are read-only, by path outside."""
    return {"name": "outgrow-monitoring", "services": {part.name: _service(part, mounts) for part in parts}}


def _service(part: Part, mounts: dict[str, str]) -> dict[str, Any]:
    image = IMAGES[part.name]
    # Not made where it is missing: Docker would make an empty folder of it.
    bound = [
        {"type": "bind", "source": outside, "target": inside, "read_only": True, "bind": {"create_host_path": False}}
        for outside, inside in mounts.items()
    ]
    service: dict[str, Any] = {
        "image": f"{image.name}:{image.version}",
        "network_mode": "host",
        # The user who has written the files, which nobody else may read.
        "user": f"{os.getuid()}:{os.getgid()}",
        "restart": "unless-stopped",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "volumes": [{"type": "bind", "source": ".", "target": str(INSIDE)}, *bound],
    }
    if part.name != "grafana":
        return service | {"entrypoint": [part.command[0]], "command": [*part.command[1:]]}
    # The image sets these itself, and they weigh more than grafana.ini.
    paths = {"CONFIG": grafana.SETTINGS_FILE, "DATA": grafana.DATA, "LOGS": grafana.LOGS, "PLUGINS": grafana.PLUGINS}
    paths |= {"PROVISIONING": grafana.PROVISIONING}
    return service | {"environment": {f"GF_PATHS_{name}": str(INSIDE / path) for name, path in paths.items()}}


def _access_mounts(site: Site) -> dict[str, str]:
    """The files that the site names, each under a path of its own."""
    there, here = site.monitoring.remote_write, site.monitoring.access
    files = {"certificate.pem": here.certificate, "key.pem": here.key, "password": here.password_file}
    if there is not None:
        files |= {"home-certificate.pem": there.certificate, "home-password": there.password_file}
    return {outside: f"{INSIDE}-access/{name}" for name, outside in files.items() if outside}
