"""``monitoring`` and ``prices`` of a site: where what runs show is gathered and served, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from outgrow.recipes.schema.options import Secret
from outgrow.recipes.schema.section import Mark, Section

Location = Annotated[str, Mark.LOCATION]
Port = Annotated[int, Field(ge=1, le=65535)]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Access(Section):
    """TLS and a password for what listens beyond loopback."""

    certificate: Location = ""
    """PEM file of the certificate; empty for plain HTTP."""
    key: Location = ""
    """PEM file of its key."""
    user: str = ""
    """User of HTTP basic authentication; empty asks for none."""
    password_file: Location = ""
    """File with the password alone, mode 0600."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if bool(self.certificate) != bool(self.key):
            yield "key" if self.certificate else "certificate", "certificate and key go together; give both or none"
        if bool(self.user) != bool(self.password_file):
            yield "password_file" if self.user else "user", "user and password_file go together; give both or none"


class RemoteWrite(Section):
    """A Prometheus elsewhere that this one sends all its samples to: from a rented node behind NAT to the one at home."""

    url: Secret
    """Its receiver, such as ``https://home.example:9641/api/v1/write``."""
    user: str = ""
    """User of HTTP basic authentication there; empty for none."""
    password_file: Location = ""
    """File with the password alone, mode 0600."""
    certificate: Location = ""
    """PEM file of the receiver's certificate, or of who issued it; empty where the system trusts it anyway."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if bool(self.user) != bool(self.password_file):
            yield "password_file" if self.user else "user", "user and password_file go together; give both or none"


class Monitoring(Section):
    """The node agent that serves every run of a node as Prometheus metrics, and what ``outgrow monitor up`` starts."""

    agent: bool = True
    """Start the node agent with the first run that finds none."""
    folder: Location = "~/.local/state/outgrow"
    """Local folder of records, logs and databases; a folder for each host is made in it."""
    address: str = "127.0.0.1"
    """Address that agent, Prometheus, Alertmanager and Grafana listen on. Another than loopback needs ``access`` or
    ``open: true``."""
    open: bool = False
    """Listen beyond loopback without a password."""
    access: Access = Access()
    """TLS and password of agent and Prometheus."""
    agent_port: Port = 9640
    """Port of the node agent; each node has one."""
    prometheus_port: Port = 9641
    """Port of Prometheus."""
    alertmanager_port: Port = 9642
    """Port of Alertmanager."""
    grafana_port: Port = 9643
    """Port of Grafana."""
    idle_s: float = Field(default=900, gt=0)
    """Seconds without a live run after which an agent ends by itself, unless ``outgrow monitor up`` keeps it."""
    stall_after_s: float = Field(default=60, gt=0)
    """Seconds without a finished step after which a run is stalled, or five times its median step where that is longer."""
    scrape_s: int = Field(default=15, ge=1)
    """Seconds between two scrapes; rules are evaluated as often."""
    keep_days: int = Field(default=30, ge=1)
    """Days that Prometheus keeps samples."""
    receive: bool = False
    """Prometheus takes samples that others send it by remote write."""
    remote_write: RemoteWrite | None = None
    """Send all samples to another Prometheus, and keep none here."""
    alert_webhook: Secret = ""
    """URL that Alertmanager posts alerts to; empty shows them in Grafana and Alertmanager alone."""
    ray_discovery: Location = "/tmp/ray/prom_metrics_service_discovery.json"
    """File in which Ray lists its own metrics targets."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.address not in _LOOPBACK and not self.open and not self.access.user:
            yield "address", f"given {self.address}, which others reach; set access: user and password_file, or open: true"
        ports: dict[int, str] = {}
        for name in ("agent_port", "prometheus_port", "alertmanager_port", "grafana_port"):
            if (other := ports.setdefault(getattr(self, name), name)) != name:
                yield name, f"given {getattr(self, name)}, which is {other} already; each needs a port of its own"
        if self.receive and self.remote_write is not None:
            yield "receive", "a Prometheus that sends its samples on keeps none; remove receive or remote_write"


class Prices(Section):
    """What machines cost, for forecasts in dollars."""

    gpu_hour: float | None = Field(default=None, ge=0)
    """US dollars an hour for each rank's GPU (or node, on CPU); none leaves money out."""
