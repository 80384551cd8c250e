"""One program that is started: its command, the files it reads, and what has to be done when one of them changes. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

from outgrow.monitoring.stack.access import host_port, reachable, url_of
from outgrow.monitoring.stack.installed import PartName
from outgrow.recipes.schema.monitoring import Monitoring

OnChange: TypeAlias = Literal["restart", "reload", "nothing"]
"""What a program must do to see a new content: be started again, be told by SIGHUP, or nothing as it looks by itself."""


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A file of a program below the stack's folder. Nobody but the user may read it: it may hold a secret."""

    path: str
    text: str
    on_change: OnChange


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program to be started. ``folders`` are made for its data; ``ready`` is the URL that answers 200 once it serves."""

    name: PartName
    command: tuple[str, ...]
    version: str
    files: tuple[ConfigFile, ...]
    folders: tuple[str, ...]
    url: str
    ready: str
    port: int
    port_key: str

    def digest(self, on_change: OnChange) -> str:
        """Changes with what makes a restart or a reload necessary, the command and version with a restart."""
        files = [(file.path, file.text) for file in self.files if file.on_change == on_change]
        known = [files, self.command, self.version] if on_change == "restart" else [files]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


Result: TypeAlias = Literal["started", "restarted", "reloaded", "running", "starting", "failed", "missing", "not needed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What ``up`` made of one part; ``text`` says why where it does not run."""

    name: PartName
    result: Result
    url: str = ""
    pid: int = 0
    version: str = ""
    text: str = ""


def as_it_is(path: str) -> str:
    return path


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the configuration of all parts follows from.

    ``folder`` is the stack's folder as the programs see it, ``seen`` any other path of this machine likewise: in a container
    both differ. ``password_hash`` is that of ``monitoring.access``, ``tls_name`` a name that its certificate is for,
    ``origin`` tells this Prometheus from others that send to the same one.
    """

    monitoring: Monitoring
    folder: PurePosixPath
    agent_url: str
    origin: str
    password_hash: str = ""
    tls_name: str = ""
    ray_dashboard: str = ""
    seen: Callable[[str], str] = as_it_is

    @property
    def tls(self) -> bool:
        return bool(self.monitoring.access.certificate)

    @property
    def has_access(self) -> bool:
        return self.tls or bool(self.monitoring.access.user)

    @property
    def sends(self) -> bool:
        """Whether all samples go to another Prometheus, which then has the rules, alerts and dashboards."""
        return self.monitoring.remote_write is not None

    def path(self, below: str) -> str:
        return str(self.folder / below)

    def url(self, port: int) -> str:
        return url_of(self.monitoring.address, port, tls=self.tls)

    def target(self, port: int) -> str:
        """``host:port`` to meet what listens there on this machine."""
        return host_port(reachable(self.monitoring.address), port)

    def listen(self, port: int) -> str:
        return host_port(self.monitoring.address, port)

    def http_client(self) -> dict[str, object]:
        """How Prometheus asks the agent and Alertmanager: the keys of any of its HTTP clients."""
        access, keys = self.monitoring.access, dict[str, object]()
        if access.user:
            keys["basic_auth"] = {"username": access.user, "password_file": self.seen(access.password_file)}
        if self.tls:
            keys["tls_config"] = {"ca_file": self.seen(access.certificate), "server_name": self.tls_name}
        return keys


WEB_FILE = "web.yml"


def web_file(setup: Setup) -> ConfigFile:
    """TLS and password of what Prometheus and Alertmanager serve; they look at it with every request."""
    access, content = setup.monitoring.access, dict[str, object]()
    if setup.tls:
        content["tls_server_config"] = {
            "cert_file": setup.seen(access.certificate),
            "key_file": setup.seen(access.key),
            "min_version": "TLS12",
        }
    if access.user:
        content["basic_auth_users"] = {access.user: setup.password_hash}
    return ConfigFile(path=WEB_FILE, text=to_yaml(content), on_change="nothing")


def to_yaml(content: object) -> str:
    import yaml

    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
